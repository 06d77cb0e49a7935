"""Splits a stream of server-sent events into job outputs: complete events, valid text, within the platform's limit.

Source of the format: the HTML standard, section "Server-sent events". vLLM ends each event with a blank line.
"""

from __future__ import annotations

import json
import re

from engine.errors import InternalError

# The platform's limit for an output of a stream, 1 MB of the JSON body that is posted.
MAX_OUTPUT_BYTES = 1_000_000
ENVELOPE_BYTES = len('{"output": ""}')
# Worst-case JSON expansion of one byte: a control character becomes six bytes (`\u001f`).
_WORST_ESCAPE_BYTES = 6
_EVENT = re.compile(r".*?(?:\n\n|\r\n\r\n)|.+\Z", re.DOTALL)


class EventBatcher:
    r"""Takes bytes as they arrive and returns text in runs of complete events.

    An event ends with a blank line (`\n\n` or `\r\n\r\n`). An output never splits a character or an event, except for
    an event that alone exceeds the limit: it is cut between characters, and the pieces joined are the event.

    Args:
        max_bytes: maximum size of one output, serialized as it is posted.
        cut: whether to cut an event above that; if not, it is one output.
    """

    def __init__(self, max_bytes: int = MAX_OUTPUT_BYTES, *, cut: bool = True) -> None:
        self._cut = cut
        self._max_bytes = max_bytes - ENVELOPE_BYTES
        if self._max_bytes < _WORST_ESCAPE_BYTES:
            raise ValueError(f"max_bytes is {max_bytes}, which leaves no room for a character")
        self._pending = bytearray()

    def feed(self, chunk: bytes) -> list[str]:
        """Take a chunk and return the outputs that it completes; none while an event is incomplete.

        Raises:
            InternalError: the stream is not UTF-8.
        """
        self._pending += chunk
        return self._take(max(self._boundary(b"\n\n"), self._boundary(b"\r\n\r\n")))

    def finish(self) -> list[str]:
        """Return the rest at the end of the stream, also if its last event is incomplete.

        Raises:
            InternalError: the stream is not UTF-8, or ends within a character.
        """
        return self._take(len(self._pending))

    def _boundary(self, mark: bytes) -> int:
        """Return the position after the last event that ends with `mark`; 0 if there is none."""
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
