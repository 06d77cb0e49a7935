"""How often a stream delivers text: the interval between its outputs, in seconds and in tokens."""

from __future__ import annotations

import math

# A delivery takes about half a millisecond of the event loop that vLLM's app needs too: at most a tenth of its time.
MAX_DELIVERIES_PER_S = 160


def interval_s(min_interval_s: float, streams: int) -> float:
    """Return the minimum time between two outputs of one stream, in seconds, while `streams` share the worker.

    Beyond a few streams it grows with their number, so that the deliveries of all cost the same time together.
    """
    return max(min_interval_s, streams / MAX_DELIVERIES_PER_S)


def interval_tokens(min_interval_s: float, streams: int, step_s: float) -> int:
    """Return how many tokens vLLM should put into one event: as many as a stream gets between two outputs.

    An event costs the same for one token as for ten, and on a busy worker several would be delivered together anyway.
    With few streams, each token is an event.

    Args:
        min_interval_s: minimum time between two outputs of one stream, in seconds.
        streams: how many streams share the worker.
        step_s: how long the engine takes for one token of each stream, in seconds.
    """
    interval = interval_s(min_interval_s, streams)
    return 1 if interval <= min_interval_s or step_s <= 0 else max(math.ceil(interval / step_s), 1)
