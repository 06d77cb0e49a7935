"""A platform behind httpx's interface for transports, on the event loop's time: `/run`, `/status` and `/health`."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

COMPLETED = {"status": "COMPLETED", "output": [{"id": "chatcmpl-1"}], "delayTime": 1000, "executionTime": 1000}
URL = "https://api.example/v2/ep"
BUCKET = "bucket.example"
KEY = "rpa_notarealkey"


@dataclass
class FakePlatform:
    """Runs each job for `job_s`; `ends` says how, by its input and by how many jobs with that input came before.

    Attributes:
        ends: returns the job's final /status document, or a status code that /status answers instead.
        refuses: returns a response to a call instead of serving it; None: serve it.
        latency_s: time until a call takes effect, and again until its answer arrives.
        submitted: how many jobs came with each input.
        running: jobs that have not ended.
        most_running: maximum of these at any time.
        bucket: responses of the bucket that large results are in, in turn.
        calls: the time of each call, by operation.
    """

    ends: Callable[[str, int], dict[str, Any] | int] = lambda _prompt, _before: COMPLETED
    refuses: Callable[[str, int], httpx.Response | None] = lambda _operation, _before: None
    job_s: float = 2.0
    latency_s: float = 0.01
    submitted: Counter[str] = field(default_factory=Counter)
    calls: dict[str, list[float]] = field(default_factory=lambda: {"run": [], "status": [], "health": []})
    bucket: list[httpx.Response] = field(default_factory=list)
    most_running: int = 0
    _jobs: dict[str, tuple[float, dict[str, Any] | int]] = field(default_factory=dict)

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self._serve)

    def running(self) -> int:
        return sum(ends_at > time.monotonic() for ends_at, _ in self._jobs.values())

    async def _serve(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == BUCKET:
            assert "Authorization" not in request.headers
            return self.bucket.pop(0)
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        operation, _, job = request.url.path.removeprefix("/v2/ep/").partition("/")
        calls = self.calls[operation]
        calls.append(time.monotonic())
        await asyncio.sleep(self.latency_s)
        answer = self.refuses(operation, len(calls) - 1)
        if answer is None:
            answer = self._answer(operation, job, request.content)
        await asyncio.sleep(self.latency_s)
        return answer

    def _answer(self, operation: str, job: str, content: bytes) -> httpx.Response:
        if operation == "health":
            return httpx.Response(200, json={"jobs": {}, "workers": {}})
        if operation == "run":
            prompt = json.loads(content)["input"]["openai_input"]["prompt"]
            job = f"job-{len(self._jobs)}"
            self._jobs[job] = (time.monotonic() + self.job_s, self.ends(prompt, self.submitted[prompt]))
            self.submitted[prompt] += 1
            self.most_running = max(self.most_running, self.running())
            return httpx.Response(200, json={"id": job, "status": "IN_QUEUE"})
        ends_at, end = self._jobs[job]
        if time.monotonic() < ends_at:
            return httpx.Response(200, json={"id": job, "status": "IN_PROGRESS"})
        return httpx.Response(end) if isinstance(end, int) else httpx.Response(200, json={"id": job, **end})
