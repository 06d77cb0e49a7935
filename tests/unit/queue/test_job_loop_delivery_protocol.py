"""What the job loop asks of a platform's own delivery: its time limit, its stop, the end of its queue."""

from __future__ import annotations

import asyncio
import json

import pytest

from engine.errors import UnusableQueueError
from engine.queue.job_loop import LoopState
from tests.fake_job_queue import Fault
from tests.unit.queue.fakes import LoopHarness
from tests.virtual_time import in_virtual_time

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("setting_s", "limit"), [(100.0, "5 s"), (3.0, "3 s"), (9.0, "5 s")])
@in_virtual_time
async def test_a_job_ends_at_the_earlier_limit_of_the_platform_and_the_setting(
    setting_s: float, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.queue.delivery.JobDelivery.time_limit_s", 5.0)
    harness = LoopHarness(execution_s=setting_s)
    harness.submit("a", waits=True)
    async with harness.running():
        error = json.loads((await harness.queue.result("a"))["error"])
    assert error["status"] == 504
    assert limit in error["error"]["message"]


async def test_a_stopped_jobs_delivery_ends_before_the_job_does(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[set[str]] = []
    harness = LoopHarness()

    async def stopped(_: object) -> None:
        told.append(set(harness.queue.in_progress))

    monkeypatch.setattr("engine.queue.delivery.JobDelivery.stopped", stopped)
    harness.submit("a", waits=True)
    async with harness.running():
        await asyncio.wait_for(harness.handler.begins.wait(), 5)
        harness.queue.stop("a")
        await asyncio.wait_for(harness.handler.closes.wait(), 5)
    assert told == [{"a"}]


async def test_a_queue_that_gives_no_job_any_more_ends_the_worker_with_1(caplog: pytest.LogCaptureFixture) -> None:
    harness = LoopHarness()
    harness.queue.take_faults.append(Fault(before=UnusableQueueError("the agent is unhealthy")))
    async with harness.running(exit_status=1) as running:
        await asyncio.wait_for(asyncio.shield(running), 5)
    assert harness.loop.state is LoopState.ENDED
    assert "the agent is unhealthy" in caplog.text
