"""Logs of one endpoint's workers, as `GET /v2/serverless/{id}/workers/{workerId}/logs` streams them.

The description says that an event's id is its timestamp, and shows `TIMESTAMP/NUMBER`: the number resumes exactly where
the stream ended, a bare timestamp at the first line of that time.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from emulator.core.long_poll import LongPoll

Source = Literal["container", "system"]
MAX_LINES: Final = 5000
"""How many lines of a worker are kept: as many as `tail` may ask for."""
_MAX_WORKERS: Final = 50
_CURSOR: Final = re.compile(r"(?P<time>[^/]+)(?:/(?P<number>\d{1,12}))?")


def format_time(at: float) -> str:
    """Return seconds since 1970 in RFC 3339, in milliseconds."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(text: str) -> float | None:
    """Return a time of RFC 3339 as seconds since 1970; None if it is none."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return None if time.tzinfo is None or "T" not in text.upper() else time.timestamp()


@dataclass(frozen=True)
class Cursor:
    """Where a stream of a worker's log begins.

    Args:
        at: no line before this time (seconds since 1970), as far as the API's timestamps can tell.
        after: no line up to this number.
        tail: at most this many lines that are there already; None: all of them.
    """

    at: float = 0.0
    after: int = 0
    tail: int | None = None

    @classmethod
    def of_event_id(cls, event_id: str) -> Cursor | None:
        """Return where an event with this id ends; None if this endpoint has no such ids."""
        match = _CURSOR.fullmatch(event_id)
        at = parse_time(match["time"]) if match else None
        if match is None or at is None:
            return None
        return cls(at=at) if match["number"] is None else cls(after=int(match["number"]))


@dataclass(frozen=True)
class LogLine:
    """One line: its number in the worker's log, when it was written (seconds since 1970), by whom."""

    number: int
    at: float
    source: Source
    text: str

    def event(self) -> str:
        """Return the line as a server-sent event."""
        ts = format_time(self.at)
        data = json.dumps({"ts": ts, "source": self.source, "line": self.text})
        return f"id: {ts}/{self.number:012d}\ndata: {data}\n\n"


class WorkerLogs:
    """The last lines of an endpoint's workers, also of those that exited last.

    Args:
        wall_clock: seconds since 1970.
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self.long_poll = LongPoll()
        """Notifies a worker's id when it has another line, or has exited."""
        self._wall_clock = wall_clock
        self._lines: dict[str, deque[LogLine]] = {}
        self._count = 0

    def add(self, worker: str, source: Source, text: str) -> None:
        """Add a line, which has no secrets in it."""
        if worker not in self._lines:
            self._lines[worker] = deque(maxlen=MAX_LINES)
            while len(self._lines) > _MAX_WORKERS:
                del self._lines[next(iter(self._lines))]
        self._count += 1
        self._lines[worker].append(LogLine(self._count, self._wall_clock(), source, text))
        self.long_poll.notify(worker)

    def has(self, worker: str) -> bool:
        """Return whether anything of a worker is kept."""
        return worker in self._lines

    def read(self, worker: str, cursor: Cursor, source: Source | None) -> list[LogLine]:
        """Return a worker's lines from a cursor on, of one source or of both, oldest first."""
        # A timestamp in milliseconds stands for every line of that millisecond.
        lines = [
            line
            for line in self._lines.get(worker, ())
            if line.number > cursor.after and line.at > cursor.at - 0.001 and source in (None, line.source)
        ]
        return lines if cursor.tail is None else lines[len(lines) - min(cursor.tail, len(lines)) :]

    @property
    def last_number(self) -> int:
        """Number of the last line of any worker."""
        return self._count
