"""One endpoint: its queue, its workers, its limits, and what happened lately."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Mapping
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
        base_url: where workers reach the emulator.
        ca_environment: variables by which workers trust the emulator's certificate.
        clock: the time in seconds, never going back.
        wall_clock: the time of day in seconds since 1970, for people to read.
        start: starts worker processes.
        faults: the emulator's.
        webhooks: who tells clients of ended jobs.
        redaction: takes secrets out of log lines.
        event_log: takes the timeline's lines: `(endpoint, line)`.
        worker_log: takes workers' log lines: `(worker, line)`.
    """

    def __init__(  # noqa: PLR0913 (everything that it is made of, so that a test can put its own in place)
        self,
        settings: EndpointSettings,
        *,
        base_url: str,
        ca_environment: Mapping[str, str],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        start: Starter,
        faults: Faults,
        webhooks: Webhooks,
        redaction: Redaction,
        event_log: Callable[[str, str], None],
        worker_log: Callable[[str, str], None],
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
        self._event_log = event_log
        self._worker_log = worker_log
        self._wall_clock = wall_clock
        self._webhooks = webhooks
        self.fleet = Fleet(
            settings,
            self.queue,
            self,
            base_url=base_url,
            worker_key=self.worker_key,
            ca_environment=ca_environment,
            clock=clock,
            start=start,
            faults=faults,
            redaction=redaction,
        )

    def changed(self, topic: str) -> None:
        """Wake whoever waits for the topic."""
        self._count_change()
        self.waiting.wake(topic)

    def ended(self, job: Job) -> None:
        """Tell the job's webhook."""
        if job.submission.webhook is not None:
            self._webhooks.send(str(job.submission.webhook), job.document())

    def worker_stopping(self, worker: str) -> None:
        """End the long polls of a worker that was asked to end."""
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

    def worker_logged(self, worker: str, line: str) -> None:
        """Pass a worker's log line on."""
        self._count_change()
        self._worker_log(worker, line)

    def event(self, line: str) -> None:
        """Add a line to the timeline."""
        self.events.append({"at": round(self._wall_clock(), 3), "text": line})
        self._count_change()
        self._event_log(self.settings.id, line)

    def _count_change(self) -> None:
        self.changes += 1
