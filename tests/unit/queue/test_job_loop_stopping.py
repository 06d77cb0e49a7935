"""The job loop stops single jobs: on the platform's stop signal, and at their execution timeout."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.unit.queue.fakes import LoopHarness, error_in
from tests.virtual_time import in_virtual_time

pytestmark = pytest.mark.anyio


async def test_a_stopped_job_is_closed_and_gets_no_result() -> None:
    harness = LoopHarness()
    async with harness.running():
        harness.submit("1", waits=True)
        harness.submit("2", waits=True)
        await harness.handler.begins.wait()
        harness.queue.stop("unknown")
        harness.queue.stop("1")
        await harness.handler.closes.wait()
        harness.handler.go.set()
        assert await harness.queue.result("2") == {"output": ["a", "b"]}
    assert "1" not in dict(harness.queue.results)
    assert harness.handler.closed == ["1", "2"]


async def test_a_job_that_is_stopped_before_its_task_runs_is_removed() -> None:
    harness = LoopHarness(limit=1)
    add_in_progress, signals = harness.queue.add_in_progress, asyncio.Queue[str]()

    def add_and_stop(job_id: str) -> None:
        add_in_progress(job_id)
        if job_id == "1":
            signals.put_nowait(job_id)

    async def stop_signals() -> list[str]:
        """Return within one turn, so before the job's task runs."""
        return [await signals.get()]

    harness.queue.add_in_progress = add_and_stop  # type: ignore[method-assign]
    harness.queue.stop_signals = stop_signals  # type: ignore[method-assign]
    async with harness.running():
        await asyncio.sleep(0.01)
        harness.submit("1")
        harness.submit("2")
        assert await harness.queue.result("2") == {"output": ["a", "b"]}
    assert harness.handler.begun == ["2"]
    assert "1" not in dict(harness.queue.results)


@in_virtual_time
async def test_a_job_is_aborted_at_the_execution_timeout() -> None:
    harness = LoopHarness(execution_s=30.0)
    async with harness.running():
        begun = time.monotonic()
        harness.submit("endless", waits=True)
        await asyncio.sleep(10)
        harness.submit("quick")
        assert await harness.queue.result("quick") == {"output": ["a", "b"]}
        await asyncio.sleep(19)
        assert "endless" not in dict(harness.queue.results)
        error = error_in(await harness.queue.result("endless"))
        assert time.monotonic() - begun == pytest.approx(30, abs=0.1)
        assert (error["status"], error["retryable"]) == (504, False)
        assert "EXECUTION_TIMEOUT_S" in error["error"]["message"]
        assert harness.handler.closed == ["quick", "endless"]
