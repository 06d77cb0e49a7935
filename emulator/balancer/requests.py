"""The requests of a load-balancing endpoint: counted for the autoscaler, shown on the page, kept in no queue."""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from emulator.core.work import Durations, QueueLoad

_KEPT = 1000
WORKERS_TOPIC = "workers"
"""Is notified when a waiting request may find a worker."""


@dataclass(eq=False)
class BalancedRequest(Durations):
    """One request or WebSocket. All times are the endpoint's clock, in seconds.

    Args:
        id: its id.
        kind: method and path.
        submitted_at: when it came.
        worker: the worker that it was sent to.
        taken_at: when it was sent to its worker.
        first_output_at: when the first bytes of the response's body came.
        ended_at: when it ended.
        status_code: of the response; 0 if it got none.
        output_count: how many pieces of the response's body came.
        is_complete: whether the response was sent to its end.
    """

    id: str
    kind: str
    submitted_at: float
    worker: str | None = None
    taken_at: float | None = None
    first_output_at: float | None = None
    ended_at: float | None = None
    status_code: int = 0
    output_count: int = 0
    is_complete: bool = False
    retries: int = 0

    @property
    def status(self) -> str:
        """Its state, in the words of a queue's jobs."""
        if self.ended_at is None:
            return "IN_QUEUE" if self.taken_at is None else "IN_PROGRESS"
        if not self.is_complete:
            return "CANCELLED" if self.status_code < HTTPStatus.BAD_REQUEST else "FAILED"
        return "COMPLETED" if self.status_code < HTTPStatus.BAD_REQUEST else "FAILED"

    def platform_document(self) -> dict[str, Any]:
        """Return the response's status."""
        return {"statusCode": self.status_code}


class Requests:
    """The requests of an endpoint; the fleet's `WorkQueue`.

    Args:
        clock: monotonic time in seconds.
        on_change: is called with a topic when something has changed.
    """

    def __init__(self, clock: Callable[[], float], on_change: Callable[[str], None]) -> None:
        self._clock = clock
        self._on_change = on_change
        self._waiting: dict[str, BalancedRequest] = {}
        self._running: dict[str, BalancedRequest] = {}
        self._recent: deque[BalancedRequest] = deque(maxlen=_KEPT)
        self._ended: Counter[str] = Counter()
        self.is_closed = False

    def add(self, kind: str) -> BalancedRequest:
        """Add a request that waits for a worker."""
        request = BalancedRequest(secrets.token_hex(8), kind, self._clock())
        self._waiting[request.id] = request
        self._recent.append(request)
        self._on_change(request.id)
        return request

    def start(self, request: BalancedRequest, worker: str) -> None:
        """Record that a request is sent to a worker."""
        del self._waiting[request.id]
        self._running[request.id] = request
        request.worker, request.taken_at = worker, self._clock()
        self._on_change(request.id)

    def count_output(self, request: BalancedRequest) -> None:
        """Record a piece of the response's body."""
        request.output_count += 1
        if request.first_output_at is None:
            request.first_output_at = self._clock()

    def end(self, request: BalancedRequest) -> None:
        """Record the end of a request."""
        self._waiting.pop(request.id, None)
        self._running.pop(request.id, None)
        request.ended_at = self._clock()
        self._ended[request.status] += 1
        self._on_change(request.id)

    @property
    def in_queue(self) -> int:
        """Number of requests that wait for a worker."""
        return len(self._waiting)

    @property
    def in_progress(self) -> int:
        """Number of requests that workers have."""
        return len(self._running)

    def expire(self) -> None:
        """Do nothing: requests apply their own time limits."""

    def load(self) -> QueueLoad:
        """Return the input of the autoscaler."""
        waits = [self._clock() - request.submitted_at for request in self._waiting.values()]
        return QueueLoad(len(self._waiting), len(self._running), max(waits, default=0.0))

    def running_jobs(self, worker: str) -> Sequence[BalancedRequest]:
        """Return the requests that a worker has."""
        return [request for request in self._running.values() if request.worker == worker]

    def on_worker_lost(self, worker: str) -> None:
        """Do nothing: its connections break."""

    def unresponsive_workers(self) -> set[str]:
        """Return none: nothing stops a request."""
        return set()

    def recent(self, count: int) -> Sequence[BalancedRequest]:
        """Return the requests that came last, newest first."""
        return list(self._recent)[: -count - 1 : -1]

    def health(self) -> dict[str, int]:
        """Return counts of requests, by the names of a queue's jobs."""
        return {
            "inQueue": self.in_queue,
            "inProgress": self.in_progress,
            "completed": self._ended["COMPLETED"],
            "failed": self._ended["FAILED"] + self._ended["CANCELLED"],
            "retried": 0,
        }

    def close(self) -> None:
        """End the waiting of all requests."""
        self.is_closed = True
        self._on_change(WORKERS_TOPIC)
