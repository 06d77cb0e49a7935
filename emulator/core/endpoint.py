"""One endpoint: its queue, its workers, its rate limits, and its recent history."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from emulator.core.faults import Faults
from emulator.core.fleet import Fleet
from emulator.core.job import Job
from emulator.core.job_queue import JOBS_QUEUED_TOPIC, JobQueue, job_stop_topic
from emulator.core.long_poll import LongPoll
from emulator.core.process import StartProcess
from emulator.core.rate_limits import RateLimiter
from emulator.core.webhooks import Webhooks
from emulator.redaction import Redaction
from emulator.settings import EndpointSettings

_MAX_EVENTS = 100
_MAX_HISTORY_POINTS = 600


class Endpoint:
    """An endpoint as the HTTP interfaces see it; the listener of its queue and of its fleet.

    Args:
        settings: settings of the endpoint.
        base_url: URL of the emulator, for workers.
        ca_environment: variables that make workers trust the emulator's TLS certificate.
        clock: monotonic time in seconds.
        wall_clock: seconds since 1970, for times that are shown.
        start: starts worker processes.
        faults: faults of the emulator.
        webhooks: notify clients of finished jobs.
        redaction: removes secrets from log lines.
        event_log: receives the timeline's lines: `(endpoint, line)`.
        worker_log: receives workers' log lines: `(worker, line)`.
    """

    def __init__(  # noqa: PLR0913 (all collaborators, so that a test can replace each)
        self,
        settings: EndpointSettings,
        *,
        base_url: str,
        ca_environment: Mapping[str, str],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        start: StartProcess,
        faults: Faults,
        webhooks: Webhooks,
        redaction: Redaction,
        event_log: Callable[[str, str], None],
        worker_log: Callable[[str, str], None],
    ) -> None:
        self.settings = settings
        self.long_poll = LongPoll()
        self.limiter = RateLimiter(clock)
        self.queue = JobQueue(settings.queue_settings(), clock, self)
        # Workers authenticate with a key of their own, which no client has.
        self.worker_key = secrets.token_urlsafe(24)
        self.events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)
        self.history: deque[dict[str, float]] = deque(maxlen=_MAX_HISTORY_POINTS)
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

    def on_change(self, topic: str) -> None:
        """Notify the long polls of the topic."""
        self._count_change()
        self.long_poll.notify(topic)

    def on_job_ended(self, job: Job) -> None:
        """Call the job's webhook."""
        if job.submission.webhook is not None:
            self._webhooks.send(str(job.submission.webhook), job.document())

    def on_event(self, line: str) -> None:
        """Add a line to the timeline."""
        self.events.append({"at": round(self._wall_clock(), 3), "text": line})
        self._count_change()
        self._event_log(self.settings.id, line)

    def on_worker_log(self, worker: str, line: str) -> None:
        """Pass a worker's log line on."""
        self._count_change()
        self._worker_log(worker, line)

    def on_worker_stopping(self, worker: str) -> None:
        """Notify the worker's long polls, so that they end."""
        self.long_poll.notify(JOBS_QUEUED_TOPIC)
        self.long_poll.notify(job_stop_topic(worker))

    def sample(self) -> None:
        """Add a point to the queue's history; to be called once a second."""
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

    def _count_change(self) -> None:
        self.changes += 1
