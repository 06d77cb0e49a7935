"""How often a stream delivers text: the interval between its outputs, in seconds and in tokens.

Each delivery costs the event loop that vLLM's app needs too. So with more streams they come further apart: up to 50 ms
while the loop has time to spare, which still reads smoothly, and as far as the loop's measured load requires beyond.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# While there are so few, each output may be a single token.
FEW_STREAMS = 3
MIN_INTERVAL_S = 0.02
SMOOTH_INTERVAL_S = 0.05
# An idle loop bears more deliveries. A loaded one is left with this many, for all streams together.
MIN_DELIVERIES_PER_S = 160
# Above this share of its time, a loop answers late, and the engine waits for it between requests.
MAX_LOAD = 0.75
_SAMPLE_S = 0.25
# How much the interval may change from one sample to the next.
_MAX_CHANGE = 1.3


_now_s = time.monotonic


class LoopLoad:
    """Measures how much of its time the thread that calls it is busy, or waits for a processor.

    Source: proc_pid_schedstat, which counts both in nanoseconds. Where Linux does not have it, only the thread's own
    processor time counts.
    """

    def __init__(self) -> None:
        self._at_s = time.monotonic()
        self._busy_s = self._measure_s()

    def sample(self) -> float:
        """Return the load since the last call, from 0 to 1."""
        now_s, busy_s = time.monotonic(), self._measure_s()
        elapsed_s = now_s - self._at_s
        load = (busy_s - self._busy_s) / elapsed_s if elapsed_s else 0.0
        self._at_s, self._busy_s = now_s, busy_s
        return load

    @staticmethod
    def _measure_s() -> float:
        waiting_ns = 0
        with suppress(OSError, ValueError):
            _, waiting_ns, _ = map(int, Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split())
        return time.thread_time() + waiting_ns / 1e9


class StreamInterval:
    """The interval between two outputs of one stream.

    Args:
        fixed_s: the interval at any number of streams, if the user has set it.
        sample_load: returns the share of its time that the event loop was busy since the last call.
    """

    def __init__(self, fixed_s: float | None = None, *, sample_load: Callable[[], float] | None = None) -> None:
        self._fixed_s = fixed_s
        self._sample_load = sample_load or LoopLoad().sample
        self._sampled_at_s = -math.inf
        self._stretch = 1.0

    def seconds(self, streams: int) -> float:
        """Return the interval while so many streams share the worker; call it in the event loop's thread."""
        if self._fixed_s is not None:
            return self._fixed_s
        longest_s = max(streams / MIN_DELIVERIES_PER_S, MIN_INTERVAL_S)
        shortest_s = min(longest_s, SMOOTH_INTERVAL_S)
        self._follow_load(longest_s / shortest_s)
        return shortest_s * self._stretch

    def tokens(self, streams: int, step_s: float) -> int:
        """Return how many tokens vLLM should put into one event: as many as a stream gets between two outputs.

        An event costs the same for one token as for ten, and on a busy worker several would be delivered together
        anyway. With few streams, each token is an event.

        Args:
            streams: how many streams share the worker.
            step_s: how long the engine takes for one token of each stream, in seconds.
        """
        if streams <= FEW_STREAMS or step_s <= 0:
            return 1
        return max(math.ceil(self.seconds(streams) / step_s), 1)

    def _follow_load(self, max_stretch: float) -> None:
        """Let the interval grow while the loop's load is above `MAX_LOAD`, and shrink while it is below."""
        now_s = _now_s()
        if now_s - self._sampled_at_s >= _SAMPLE_S:
            self._sampled_at_s = now_s
            change = self._sample_load() / MAX_LOAD
            self._stretch *= min(max(change, 1 / _MAX_CHANGE), _MAX_CHANGE)
        self._stretch = min(max(self._stretch, 1.0), max_stretch)
