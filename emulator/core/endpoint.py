"""One endpoint: its queue, its workers, its limits, and what happened lately."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from typing import Any

from emulator.core.faults import Faults
from emulator.core.fleet import Fleet
from emulator.core.job import Job
from emulator.core.job_queue import WAITING, Queue, stop_topic
from emulator.core.long_poll import Waiting
from emulator.core.process import Starter
from emulator.core.rate_limits import RateLimiter
from emulator.core.webhooks import Webhooks
from emulator.redaction import Redaction
from emulator.settings import EndpointSettings

_EVENTS = 100
_HISTORY_S = 600


class Endpoint:
    """An endpoint as the APIs see it; it listens to its queue.

    Args:
        settings: the endpoint's.
        clock: the time in seconds, never going back.
        wall_clock: the time of day in seconds since 1970, for people to read.
        start: starts worker processes.
        faults: the emulator's.
        webhooks: who tells clients of ended jobs.
        redaction: takes secrets out of log lines.
    """

    def __init__(  # noqa: PLR0913 (everything that it is made of, so that a test can put its own in place)
        self,
        settings: EndpointSettings,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        start: Starter,
        faults: Faults,
        webhooks: Webhooks,
        redaction: Redaction,
    ) -> None:
        self.settings = settings
        self.waiting = Waiting()
        self.limiter = RateLimiter(clock)
        self.queue = Queue(settings.rules(), clock, self)
        # Workers authorize themselves with a key of their own, which no client has.
        self.worker_key = secrets.token_urlsafe(24)
        self.events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self.history: deque[dict[str, float]] = deque(maxlen=_HISTORY_S)
        self.duplicates: list[list[Job]] = []
        self.changes = 0
        self.announce: Callable[[str], None] = lambda _line: None
        self._wall_clock = wall_clock
        self._webhooks = webhooks
        self.fleet = Fleet(
            settings,
            self.queue,
            clock=clock,
            start=start,
            faults=faults,
            redaction=redaction,
            event=self._event,
            release=self._release,
            key=self.worker_key,
        )
        self.worker_log: Callable[[str, str], None] = lambda _worker, _line: None
        self.fleet.log = self._logged

    def changed(self, topic: str) -> None:
        """Wake whoever waits for the topic."""
        self._count_change()
        self.waiting.wake(topic)

    def ended(self, job: Job) -> None:
        """Tell the job's webhook."""
        if job.submission.webhook is not None:
            self._webhooks.send(str(job.submission.webhook), job.document())

    def _release(self, worker: str) -> None:
        self.waiting.wake(WAITING)
        self.waiting.wake(stop_topic(worker))

    def sample(self) -> None:
        """Add a point to the queue's history: to be called once a second."""
        workers = self.fleet.health()
        self.history.append(
            {
                "at": round(self._wall_clock(), 3),
                "inQueue": self.queue.in_queue,
                "inProgress": self.queue.in_progress,
                "workers": workers["idle"] + workers["running"],
                "initializing": workers["initializing"],
            }
        )
        self._count_change()

    def _logged(self, worker: str, line: str) -> None:
        self._count_change()
        self.worker_log(worker, line)

    def _event(self, line: str) -> None:
        self.events.append({"at": round(self._wall_clock(), 3), "text": line})
        self._count_change()
        self.announce(line)

    def _count_change(self) -> None:
        self.changes += 1
