"""Gathers a stream of server-sent events into job outputs: whole events, valid text, under the platform's cap.

Source of the format: the HTML standard, section "Server-sent events"; vLLM ends each event with a blank line.
"""

from __future__ import annotations

import json
import math
import re

from engine.errors import InternalError

# The platform caps a streamed chunk at 1 MB; counted on the JSON text that is posted, envelope included.
MAX_OUTPUT_BYTES = 1_000_000
ENVELOPE_BYTES = len('{"output": ""}')
# The most bytes that JSON makes of one character: a control character becomes six (`\u001f`).
_WORST_ESCAPE_BYTES = 6
# A delivery costs half a millisecond of the one core that vLLM's app runs on too: at most a tenth of it.
MAX_DELIVERIES_PER_S = 160
_EVENT = re.compile(r".*?(?:\n\n|\r\n\r\n)|.+\Z", re.DOTALL)


def interval_s(least_s: float, streams: int) -> float:
    """Least time between two outputs of one stream, in seconds, while so many streams share the worker.

    Beyond a few streams it grows with their number, so that what deliveries cost together stays the same.
    """
    return max(least_s, streams / MAX_DELIVERIES_PER_S)


def interval_tokens(least_s: float, streams: int, step_s: float) -> int:
    """How many tokens vLLM should make one event of: as many as a stream makes between two of its outputs.

    Events that leave together cost as much to make as events that leave alone. While a few streams run, and nothing is
    short, each token is an event.

    Args:
        least_s: least time between two outputs of one stream, in seconds.
        streams: how many streams share the worker.
        step_s: how long the engine takes for a token of each stream, in seconds.
    """
    interval = interval_s(least_s, streams)
    return 1 if interval <= least_s or step_s <= 0 else max(math.ceil(interval / step_s), 1)


class EventBatcher:
    r"""Bytes in, as they come; text out, in runs of complete events.

    An event ends with a blank line (`\n\n` or `\r\n\r\n`). An output is never half a character and never half an
    event, but for an event that is above the cap all alone: that one goes out in pieces, cut between characters, so
    that nothing is lost and the pieces joined are the event.

    Args:
        max_bytes: the most that one output may have, serialized as the platform gets it.
        cut: whether an event above that is cut; if not, it goes out whole.
    """

    def __init__(self, max_bytes: int = MAX_OUTPUT_BYTES, *, cut: bool = True) -> None:
        self._cut = cut
        self._max_bytes = max_bytes - ENVELOPE_BYTES
        if self._max_bytes < _WORST_ESCAPE_BYTES:
            raise ValueError(f"max_bytes is {max_bytes}, which leaves no room for a character")
        self._pending = bytearray()

    def feed(self, chunk: bytes) -> list[str]:
        """Take a chunk and return the outputs that are complete with it: none while an event is still open.

        Raises:
            InternalError: the stream is not UTF-8.
        """
        self._pending += chunk
        return self._take(max(self._boundary(b"\n\n"), self._boundary(b"\r\n\r\n")))

    def finish(self) -> list[str]:
        """Return what is left at the stream's end, whether it ended with an event or not.

        Raises:
            InternalError: the stream is not UTF-8, or ended within a character.
        """
        return self._take(len(self._pending))

    def _boundary(self, mark: bytes) -> int:
        """Where the last event that ends with `mark` ends; 0 if none does."""
        start = self._pending.rfind(mark)
        return 0 if start < 0 else start + len(mark)

    def _take(self, end: int) -> list[str]:
        taken = bytes(self._pending[:end])
        del self._pending[:end]
        try:
            text = taken.decode()
        except UnicodeDecodeError as error:
            raise InternalError(f"the engine's stream is not UTF-8: {error.reason}") from None
        if len(taken) * _WORST_ESCAPE_BYTES <= self._max_bytes:
            return [text] if text else []
        return self._split(text)

    def _split(self, text: str) -> list[str]:
        outputs: list[str] = []
        run: list[str] = []
        run_bytes = 0
        for event in _EVENT.findall(text):
            size = len(json.dumps(event, ensure_ascii=False).encode()) - len('""')
            if run and run_bytes + size > self._max_bytes:
                outputs.append("".join(run))
                run, run_bytes = [], 0
            if size > self._max_bytes and self._cut:
                step = self._max_bytes // _WORST_ESCAPE_BYTES
                outputs += (event[start : start + step] for start in range(0, len(event), step))
            else:
                run.append(event)
                run_bytes += size
        if run:
            outputs.append("".join(run))
        return outputs
