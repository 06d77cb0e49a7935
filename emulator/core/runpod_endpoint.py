"""One endpoint on RunPod: its queue, its workers, its rate limits, its webhooks."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from emulator.core.connections import WorkerConnections
from emulator.core.endpoint import Endpoint, Surroundings
from emulator.core.job import Job
from emulator.core.job_queue import JOBS_QUEUED_TOPIC, JobQueue, job_stop_topic
from emulator.core.process import worker_environment
from emulator.core.rate_limits import RateLimiter
from emulator.core.webhooks import Webhooks
from emulator.redaction import Redaction
from emulator.settings import EndpointSettings, FleetSettings


class RunPodEndpoint(Endpoint):
    """An endpoint as RunPod's interfaces see it; also the listener of its queue.

    Args:
        settings: settings of the endpoint.
        surroundings: what all endpoints share.
        base_url: URL of the emulator, for workers.
        ca_environment: variables that make workers trust the emulator's TLS certificate.
        webhooks: notify clients of finished jobs.
    """

    settings: EndpointSettings
    queue: JobQueue

    def __init__(
        self,
        settings: EndpointSettings,
        surroundings: Surroundings,
        *,
        base_url: str,
        ca_environment: Mapping[str, str],
        webhooks: Webhooks,
    ) -> None:
        super().__init__(settings, surroundings)
        self.limiter = RateLimiter(surroundings.clock)
        self.queue = JobQueue(settings.queue_settings(), surroundings.clock, self)
        # Workers authenticate with a key of their own, which no client has.
        self.worker_key = secrets.token_urlsafe(24)
        self.duplicates: list[list[Job]] = []
        self.connections = WorkerConnections()
        self._base_url = base_url
        self._ca_environment = ca_environment
        self._webhooks = webhooks
        self.fleet = self._create_fleet(self._environment, surroundings.redaction.including(self.worker_key))

    def _environment(self, worker: str) -> dict[str, str]:
        settings = self.settings
        env = worker_environment(self._base_url, settings.id, worker, self.worker_key, settings.ping_interval_ms)
        return {**env, **self._ca_environment}

    def update(self, settings: FleetSettings, redaction: Redaction, version: int) -> None:
        """Apply other settings, to the queue too."""
        super().update(settings, redaction.including(self.worker_key), version)
        self.queue.settings = self.settings.queue_settings()

    def page_document(self) -> dict[str, str | None]:
        """Return how the page reaches the endpoint's APIs."""
        root = f"/v2/{self.settings.id}"
        return {
            "openaiPath": f"{root}/openai/v1",
            "authorization": "Bearer {key}",
            "cancelPath": f"{root}/cancel/{{job}}",
        }

    def request_urls(self) -> dict[str, str]:
        """Return the URLs of the operations that clients call, by the names of the API."""
        root = f"{self._base_url}/v2/{self.settings.id}"
        names = {
            "run": "run",
            "runSync": "runsync",
            "status": "status/{job_id}",
            "stream": "stream/{job_id}",
            "cancel": "cancel/{job_id}",
            "retry": "retry/{job_id}",
            "purgeQueue": "purge-queue",
            "health": "health",
        }
        return {name: f"{root}/{path}" for name, path in names.items()}

    def forget_duplicates(self) -> None:
        """Drop the jobs that a fault would still give out a second time."""
        self.duplicates.clear()

    def on_job_ended(self, job: Job) -> None:
        """Call the job's webhook."""
        if job.submission.webhook is not None:
            self._webhooks.send(str(job.submission.webhook), job.document())

    def on_worker_stopping(self, worker: str) -> None:
        """Notify the worker's long polls, so that they end."""
        self.long_poll.notify(JOBS_QUEUED_TOPIC)
        self.long_poll.notify(job_stop_topic(worker))

    def on_worker_exited(self, worker: str) -> None:
        """Forget the worker's connections."""
        self.connections.forget(worker)

    def on_worker_frozen(self, worker: str, *, drops_connections: bool) -> None:
        """Close the worker's connections."""
        if drops_connections:
            self.connections.drop(worker)

    def on_worker_thawed(self, worker: str) -> None:
        """Notify the worker's long polls, so that they are given jobs again."""
        self.long_poll.notify(JOBS_QUEUED_TOPIC)
        self.long_poll.notify(job_stop_topic(worker))
