"""Fakes of what the job loop depends on, and a harness that connects them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from engine.queue.admission import Admission
from engine.queue.job_loop import Handler, JobLoop, LoopState, Timeouts
from tests.fake_job_queue import FakeJobQueue


@dataclass
class FakeLoad:
    """An engine's statistics, set by a test."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    avg_prompt_tokens: float = 100.0
    avg_output_tokens: float = 800.0
    avg_running_output_tokens: float = 0.0


class FakeHandler:
    """Yields the `words` of a job's input; then it waits for `go`, raises, or yields an error if the input says so."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.closed: list[str] = []
        self.begins = asyncio.Event()
        self.closes = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        self.begun.append(job["id"])
        self.begins.set()
        try:
            for word in job["input"].get("words", ["a", "b"]):
                yield word
            if job["input"].get("waits"):
                await self.go.wait()
            if job["input"].get("fails"):
                raise RuntimeError("a bug")
            if job["input"].get("error"):
                yield {"error": job["input"]["error"]}
        finally:
            self.closed.append(job["id"])
            self.closes.set()


class LoopHarness:
    """A job loop with fakes of all that it depends on.

    Args:
        handler: in place of `FakeHandler`.
        limit: maximum number of jobs at once.
        cache_tokens: capacity of the engine's KV cache.
        failure: in place of one that returns `engine_failure`.
        log_inputs: whether the log shows the inputs of jobs.
        timeouts: fields of `Timeouts`.
    """

    def __init__(
        self,
        handler: Handler | None = None,
        *,
        limit: int = 8,
        cache_tokens: int = 10**6,
        failure: Callable[[], str | None] | None = None,
        log_inputs: bool = False,
        **timeouts: float,
    ) -> None:
        self.queue = FakeJobQueue(lambda: self.loop.state is LoopState.SERVING)
        self.handler, self.load = FakeHandler(), FakeLoad()
        self.engine_failure: str | None = None
        self.load_changed = asyncio.Event()
        self.loop = JobLoop(
            self.queue,
            handler or self.handler,
            Admission(self.load, limit, cache_tokens),
            load_changed=self.load_changed,
            failure=failure or (lambda: self.engine_failure),
            timeouts=Timeouts(**timeouts),
            log_inputs=log_inputs,
        )

    def submit(self, job_id: str, **value: Any) -> None:
        """Queue a job with this input."""
        self.queue.submit({"id": job_id, "input": value})

    @asynccontextmanager
    async def running(self, exit_status: int = 0) -> AsyncIterator[asyncio.Task[int]]:
        """Run the loop during the block, and stop it afterwards.

        The loop must end with this exit status, and leave no task, no job in progress and no violation of the protocol.
        """
        before = asyncio.all_tasks()
        task = asyncio.create_task(self.loop.run())
        yield task
        self.loop.stop()
        async with asyncio.timeout(20):
            assert await task == exit_status
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
        assert self.queue.in_progress == set()
        assert self.queue.violations == []


def error_in(result: dict[str, Any]) -> dict[str, Any]:
    """Parse the error that a job has failed with."""
    document = json.loads(result["error"])
    assert isinstance(document, dict)
    return document
