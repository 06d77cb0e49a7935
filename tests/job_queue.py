"""A small queue that speaks the platform's worker protocol over HTTP, as runpod 1.12.0 does, for one real worker."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import parse_qs, urlsplit

POLL_S = 5.0


@dataclass
class QueuedJob:
    """A job, and what the worker has delivered for it."""

    id: str
    input: Any
    streamed: queue.Queue[Any] = field(default_factory=queue.Queue)
    result: dict[str, Any] = field(default_factory=dict)
    _done: threading.Event = field(default_factory=threading.Event)

    def finish(self, result: dict[str, Any]) -> None:
        self.result = result
        self._done.set()

    def wait(self, timeout_s: float = 60.0) -> list[Any]:
        """All outputs that were streamed, once the job is done."""
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"job {self.id} is not done after {timeout_s} s")
        return list(self.streamed.queue)

    @property
    def ended(self) -> bool:
        return self._done.is_set()

    @property
    def error(self) -> dict[str, Any]:
        """The error that the job failed with, parsed as a client would."""
        document = json.loads(self.result["error"])
        if not isinstance(document, dict):
            raise TypeError(f"not an error document: {document!r}")
        return document


class JobQueue:
    """Jobs go in by `submit`; a worker whose environment holds `environment` takes them."""

    def __init__(self, address: str) -> None:
        self._base = f"{address}/v2/test"
        self._waiting: queue.Queue[QueuedJob] = queue.Queue()
        self._stops: queue.Queue[str] = queue.Queue()
        self._numbers = count(1)
        self.jobs: dict[str, QueuedJob] = {}
        self.pinged = threading.Event()

    @property
    def environment(self) -> dict[str, str]:
        """What the platform sets for its workers."""
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{self._base}/job-take/$ID?gpu=cpu",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{self._base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=cpu",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self._base}/job-done/$RUNPOD_POD_ID/$ID?gpu=cpu",
            "RUNPOD_WEBHOOK_PING": f"{self._base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_POD_ID": "worker-1",
            "RUNPOD_AI_API_KEY": "key",
        }

    def submit(self, value: Any) -> QueuedJob:
        job = QueuedJob(f"job-{next(self._numbers)}", value)
        self.jobs[job.id] = job
        self._waiting.put(job)
        return job

    def run(self, value: Any, timeout_s: float = 60.0) -> QueuedJob:
        """Submit and wait for the end."""
        job = self.submit(value)
        job.wait(timeout_s)
        return job

    def stop(self, job: QueuedJob) -> None:
        """Tell the worker to stop a job that it holds."""
        self._stops.put(job.id)

    def take(self, most: int) -> list[QueuedJob]:
        return _drain(self._waiting, most)

    def stops(self) -> list[str]:
        return _drain(self._stops, 100)


def _drain(source: queue.Queue[Any], most: int) -> list[Any]:
    """Wait for one item, then take what else is there."""
    found = []
    try:
        found.append(source.get(timeout=POLL_S))
        while len(found) < most:
            found.append(source.get_nowait())
    except queue.Empty:
        pass
    return found


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        match url.path.split("/")[3]:
            case "job-take":
                jobs = self.server.queue.take(1)
                self._answer({"id": jobs[0].id, "input": jobs[0].input} if jobs else None)
            case "job-take-batch":
                jobs = self.server.queue.take(int(parse_qs(url.query)["batch_size"][0]))
                self._answer([{"id": job.id, "input": job.input} for job in jobs] or None)
            case "job-stop":
                stops = self.server.queue.stops()
                self._answer({"jobsToStop": stops} if stops else None)
            case "ping":
                self.server.queue.pinged.set()
                self._answer({})
            case _:
                self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        _, _, _, kind, _, job_id = urlsplit(self.path).path.split("/")
        job = self.server.queue.jobs[job_id]
        if kind == "job-stream":
            job.streamed.put(body["output"])
        else:
            job.finish(body)
        self._answer({})

    def _answer(self, document: Any) -> None:
        data = b"" if document is None else json.dumps(document).encode()
        self.send_response(204 if document is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.queue = JobQueue(f"http://127.0.0.1:{self.server_port}")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A worker that is gone while its poll is answered is no error here."""


@contextmanager
def serving() -> Iterator[JobQueue]:
    """A queue on a free port of the loopback interface."""
    server = _Server()
    jobs_queue = server.queue
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield jobs_queue
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
