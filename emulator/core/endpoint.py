"""What an endpoint has on any platform: its queue, its workers, and its recent history."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from emulator.core.faults import Faults
from emulator.core.fleet import Fleet
from emulator.core.long_poll import LongPoll
from emulator.core.process import StartProcess
from emulator.core.work import WorkQueue
from emulator.redaction import Redaction
from emulator.settings import FleetSettings

_MAX_EVENTS = 100
_MAX_HISTORY_POINTS = 600


@dataclass(frozen=True)
class Surroundings:
    """What all endpoints of an emulator share, so that a test can replace each.

    Args:
        clock: monotonic time in seconds.
        wall_clock: seconds since 1970.
        start: starts worker processes.
        faults: faults of the emulator.
        redaction: removes secrets from log lines.
        event_log: receives the timelines' lines: `(endpoint, line)`.
        worker_log: receives workers' log lines: `(worker, line)`.
    """

    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    start: StartProcess
    faults: Faults
    redaction: Redaction
    event_log: Callable[[str, str], None]
    worker_log: Callable[[str, str], None]


class Endpoint(ABC):
    """An endpoint as the HTTP interfaces see it; the listener of its fleet, and of its queue's changes.

    A platform's endpoint has its queue in `queue`, and makes its `fleet` with `_create_fleet`.
    """

    queue: WorkQueue
    fleet: Fleet

    def __init__(self, settings: FleetSettings, surroundings: Surroundings) -> None:
        self.settings = settings
        self.long_poll = LongPoll()
        self.events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)
        self.history: deque[dict[str, float]] = deque(maxlen=_MAX_HISTORY_POINTS)
        self.changes = 0
        self._surroundings = surroundings

    def _create_fleet(self, environment: Callable[[str], Mapping[str, str]], redaction: Redaction) -> Fleet:
        shared = self._surroundings
        return Fleet(
            self.settings,
            self.queue,
            self,
            environment=environment,
            clock=shared.clock,
            start=shared.start,
            faults=shared.faults,
            redaction=redaction,
        )

    def update(self, settings: FleetSettings, redaction: Redaction, version: int) -> None:
        """Apply other settings; see `Fleet.update`."""
        self.settings = settings
        self.fleet.update(settings, redaction, version)

    @abstractmethod
    def page_document(self) -> dict[str, str | None]:
        """Return how the page reaches the endpoint's APIs.

        `openaiPath`: base of the OpenAI API; `authorization`: the header's value, with `{key}` for the API key;
        `cancelPath`: with `{job}` for the id; None if running jobs cannot be cancelled.
        """

    @abstractmethod
    def forget_duplicates(self) -> None:
        """Drop what a fault would still give out a second time."""

    @abstractmethod
    def on_worker_stopping(self, worker: str) -> None:
        """Notify the worker's long polls, so that they end."""

    @abstractmethod
    def on_worker_exited(self, worker: str) -> None:
        """Release what the platform keeps for a worker."""

    async def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Release what the endpoint holds, once its workers have exited."""

    @abstractmethod
    def on_worker_frozen(self, worker: str, *, drops_connections: bool) -> None:
        """Close the worker's connections, if the platform has its own."""

    @abstractmethod
    def on_worker_thawed(self, worker: str) -> None:
        """Notify the worker's long polls, so that they are given jobs again."""

    def on_change(self, topic: str) -> None:
        """Notify the long polls of the topic."""
        self._count_change()
        self.long_poll.notify(topic)

    def on_event(self, line: str) -> None:
        """Add a line to the timeline."""
        self.events.append({"at": round(self._surroundings.wall_clock(), 3), "text": line})
        self._count_change()
        self._surroundings.event_log(self.settings.id, line)

    def on_worker_log(self, worker: str, line: str) -> None:
        """Pass a worker's log line on."""
        self._count_change()
        self._surroundings.worker_log(worker, line)

    def sample(self) -> None:
        """Add a point to the queue's history; to be called once a second."""
        workers = self.fleet.health()
        self.history.append(
            {
                "at": round(self._surroundings.wall_clock(), 3),
                "inQueue": self.queue.in_queue,
                "inProgress": self.queue.in_progress,
                "workers": workers["idle"] + workers["running"],
                "initializing": workers["initializing"],
            }
        )
        self._count_change()

    def _count_change(self) -> None:
        self.changes += 1
