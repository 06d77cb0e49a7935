"""A worker that was frozen for hours goes on: no timeout has passed, connections are new, no job is lost or doubled."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.queue.protocol import TAKE_TIMEOUT_S
from engine.run_clock import CLOCK
from tests.fake_job_queue import Fault
from tests.unit.queue.fakes import LoopHarness, error_in
from tests.virtual_time import freeze, in_virtual_time, watched_for_freezes

LONG_S = 10_000.0


@asynccontextmanager
async def watched(harness: LoopHarness) -> AsyncIterator[Callable[[], None]]:
    """Run the loop during the block; yield a function that freezes the worker for hours."""
    loop = asyncio.get_running_loop()
    with watched_for_freezes(loop, harness.loop.on_thaw):
        async with harness.running():
            await asyncio.sleep(0.01)
            yield functools.partial(freeze, loop, LONG_S)


@in_virtual_time
async def test_an_idle_worker_takes_a_job_at_once_after_a_freeze() -> None:
    harness = LoopHarness()
    async with watched(harness) as freeze_worker:
        freeze_worker()
        await asyncio.sleep(0)
        harness.submit("1")
        thawed_at = CLOCK.now()

        assert await harness.queue.result("1") == {"output": ["a", "b"]}
        assert CLOCK.now() - thawed_at < 0.01
    assert harness.queue.reconnects == 1


@in_virtual_time
async def test_a_take_whose_connection_died_in_a_freeze_is_repeated_at_once() -> None:
    harness = LoopHarness()
    harness.queue.take_faults.append(Fault(after=ConnectionError("closed")))
    async with watched(harness) as freeze_worker:
        assert len(harness.queue.take_counts) == 1
        freeze_worker()
        await asyncio.sleep(0.01)

        assert len(harness.queue.take_counts) == 2


@in_virtual_time
async def test_a_job_that_came_with_a_take_during_the_freeze_is_run() -> None:
    """Its timeout and the answer are noticed in the same turn of the event loop."""
    harness = LoopHarness()
    answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
    take = harness.queue.take

    async def take_once(_: int) -> list[Any]:
        harness.queue.take = take  # type: ignore[method-assign]
        jobs = await answer
        harness.queue.unfinished.add("1")
        return jobs

    harness.queue.take = take_once  # type: ignore[method-assign,assignment]
    async with watched(harness) as freeze_worker:
        loop = asyncio.get_running_loop()
        loop.call_later(TAKE_TIMEOUT_S - 0.001, answer.set_result, [{"id": "1", "input": {}}])
        freeze_worker()

        assert await harness.queue.result("1") == {"output": ["a", "b"]}


@in_virtual_time
async def test_the_execution_timeout_counts_only_time_in_which_the_worker_ran() -> None:
    harness = LoopHarness(execution_s=30.0)
    async with watched(harness) as freeze_worker:
        harness.submit("quick", waits=True)
        harness.submit("endless", waits=True)
        await harness.handler.begins.wait()
        await asyncio.sleep(20)
        freeze_worker()
        await asyncio.sleep(9)
        assert harness.queue.results == []
        await asyncio.sleep(2)
        assert error_in(await harness.queue.result("endless"))["status"] == 504


@in_virtual_time
async def test_the_drain_timeout_counts_only_time_in_which_the_worker_ran() -> None:
    harness = LoopHarness(drain_s=25.0)
    async with watched(harness) as freeze_worker:
        harness.submit("1", waits=True)
        await harness.handler.begins.wait()
        harness.loop.stop()
        await asyncio.sleep(1)
        freeze_worker()
        await asyncio.sleep(1)
        harness.handler.go.set()

        assert await harness.queue.result("1") == {"output": ["a", "b"]}
    assert harness.queue.reconnects == 0


@in_virtual_time
async def test_a_delivery_that_failed_before_a_freeze_of_hours_is_tried_again() -> None:
    harness = LoopHarness(delivery_s=60.0)
    async with watched(harness) as freeze_worker:
        harness.queue.down = True
        harness.submit("1")
        await harness.handler.begins.wait()
        await asyncio.sleep(1)
        freeze_worker()
        harness.queue.down = False

        assert await harness.queue.result("1") == {"output": ["a", "b"]}
    assert harness.queue.outputs == [("1", "a"), ("1", "b")]


@in_virtual_time
async def test_a_job_that_is_given_out_again_after_a_freeze_runs_again_from_its_beginning() -> None:
    """The platform took the worker for lost: it has dropped the outputs of the run that was frozen."""
    runs = 0

    async def handler(_: dict[str, Any]) -> AsyncGenerator[Any, None]:
        nonlocal runs
        runs += 1
        yield f"first of run {runs}"
        if runs == 1:
            await asyncio.Event().wait()
        yield f"last of run {runs}"

    harness = LoopHarness(handler)
    async with watched(harness) as freeze_worker:
        harness.submit("1")
        await asyncio.sleep(1)
        freeze_worker()
        await asyncio.sleep(0)
        harness.queue.outputs.clear()
        harness.submit("1")

        assert await harness.queue.result("1") == {"output": ["first of run 2", "last of run 2"]}
    assert harness.queue.outputs == [("1", "first of run 2"), ("1", "last of run 2")]
    assert len(harness.queue.results) == 1


@in_virtual_time
async def test_a_job_that_is_given_out_twice_long_after_a_freeze_runs_once() -> None:
    harness = LoopHarness()
    async with watched(harness) as freeze_worker:
        freeze_worker()
        await asyncio.sleep(1)
        harness.submit("1", waits=True)
        await asyncio.sleep(1)
        harness.submit("1", waits=True)
        await asyncio.sleep(1)
        harness.handler.go.set()
        await harness.queue.result("1")
    assert harness.handler.begun == ["1"]


@pytest.mark.parametrize("running", [False, True], ids=["idle", "in mid-stream"])
def test_the_log_says_how_long_the_first_answer_took_after_a_restore(
    running: bool, caplog: pytest.LogCaptureFixture
) -> None:
    @in_virtual_time
    async def check() -> None:
        harness = LoopHarness()
        async with watched(harness) as freeze_worker:
            if running:
                harness.submit("1", words=["a"], waits=True)
                await harness.handler.begins.wait()
                await asyncio.sleep(1)
            freeze_worker()
            await asyncio.sleep(2)
            harness.submit("2")
            await harness.queue.result("2")
            harness.handler.go.set()

    with caplog.at_level("INFO", "engine"):
        check()

    (restored,) = [line for line in caplog.messages if line.startswith("Restored")]
    assert restored == f"Restored: the process did not run for {LONG_S:.1f} s; {int(running)} jobs in progress"
    (first,) = [line for line in caplog.messages if line.startswith("First output")]
    assert first.startswith('First output since the restore {"total_s": 2.0')
    assert list(json.loads(first[first.index("{") :])["phases_s"]) == [
        "first_take",
        "first_output",
    ]
