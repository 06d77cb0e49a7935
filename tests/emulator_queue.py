"""The emulator's queue, for a worker that a test starts itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from emulator.app import Emulator, run_in_thread
from emulator.core.process import worker_environment
from emulator.settings import EmulatorSettings

_ENDPOINT = "test"
_KEY = "rpa_notarealkey"


@dataclass
class QueuedJob:
    """A job, and the outputs that were streamed so far."""

    id: str
    client: httpx.Client
    outputs: list[Any] = field(default_factory=list)

    def first_output(self, timeout_s: float = 60.0) -> Any:
        """Wait for the first output and return it."""
        self._read(timeout_s, lambda _: bool(self.outputs))
        return self.outputs[0]

    def wait(self, timeout_s: float = 60.0) -> list[Any]:
        """Wait for the end of the job and return its streamed outputs."""
        self._read(timeout_s, lambda status: status not in ("IN_QUEUE", "IN_PROGRESS"))
        return self.outputs

    def status(self) -> dict[str, Any]:
        """Return the response of `/status`."""
        document: dict[str, Any] = self.client.get(f"/status/{self.id}").raise_for_status().json()
        return document

    def error(self) -> dict[str, Any]:
        """Return the error that the job failed with, parsed as a client parses it."""
        document: dict[str, Any] = json.loads(self.status()["error"])
        return document

    def _read(self, timeout_s: float, is_enough: Any) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self.client.get(f"/stream/{self.id}").raise_for_status().json()
            self.outputs += [item["output"] for item in answer["stream"]]
            if is_enough(answer["status"]):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {self.id} is {answer['status']} after {timeout_s} s")


class EmulatorQueue:
    """The queue of an endpoint. A worker with the variables of `environment` takes its jobs.

    Attributes:
        environment: variables of a worker.
        base_url: of the API for clients.
        endpoint: id of the endpoint.
        key: the API key of clients.
    """

    def __init__(self, emulator: Emulator, client: httpx.Client) -> None:
        self._client = client
        self.base_url, self.endpoint, self.key = f"{emulator.url}/v2", _ENDPOINT, _KEY
        self.environment = worker_environment(emulator.url, _ENDPOINT, "worker-1", _KEY, ping_interval_ms=10_000)

    def submit(self, value: Any) -> QueuedJob:
        """Queue a job with this input, sent as ASCII, so that it may have half of a surrogate pair."""
        answer = self._client.post("/run", content=json.dumps({"input": value})).raise_for_status()
        return QueuedJob(answer.json()["id"], self._client)

    def run(self, value: Any, timeout_s: float = 60.0) -> QueuedJob:
        """Queue a job and wait for its end."""
        job = self.submit(value)
        job.wait(timeout_s)
        return job

    def cancel(self, job: QueuedJob) -> None:
        """Cancel a job; its worker gets a stop signal."""
        self._client.post(f"/cancel/{job.id}").raise_for_status()

    def waiting(self) -> int:
        """Return how many jobs no worker has taken."""
        jobs: dict[str, int] = self._client.get("/health").raise_for_status().json()["jobs"]
        return jobs["inQueue"]

    def has_worker(self) -> bool:
        """Return whether a worker has polled for jobs."""
        workers: dict[str, int] = self._client.get("/health").raise_for_status().json()["workers"]
        return workers["idle"] + workers["running"] > 0


@contextmanager
def emulator_queue() -> Iterator[EmulatorQueue]:
    """Run an emulator on a free port of the loopback interface, and yield its queue."""
    endpoint = {"id": _ENDPOINT, "rateLimits": False}
    settings = EmulatorSettings.model_validate({"port": 0, "apiKeys": [_KEY], "endpoints": [endpoint]})
    headers = {"Authorization": _KEY}
    with (
        run_in_thread(settings) as emulator,
        httpx.Client(base_url=f"{emulator.url}/v2/{_ENDPOINT}", headers=headers, timeout=60) as client,
    ):
        yield EmulatorQueue(emulator, client)
