"""The job loop ends: it drains when it is stopped, and fails its jobs as retryable when the engine fails."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from engine.backend.statistics import Statistics
from engine.backend.vllm_engine import FIRST_STEP_FACTOR, VLLMEngine
from engine.errors import DeliveryError
from engine.queue.job_loop import ABANDON_TIMEOUT_S, FINAL_DELIVERY_TIMEOUT_S
from engine.queue.protocol import POLL_CANCEL_GRACE_S
from engine.queue.running_job import JobState
from tests.fake_job_queue import Fault
from tests.unit.queue.fakes import LoopHarness, error_in
from tests.virtual_time import in_virtual_time

pytestmark = pytest.mark.anyio


async def test_after_stop_running_jobs_complete_and_no_other_is_taken() -> None:
    harness = LoopHarness()
    async with harness.running():
        harness.submit("1", waits=True)
        await harness.handler.begins.wait()
        harness.loop.stop()
        await asyncio.sleep(0.01)
        harness.submit("2")
        harness.handler.go.set()

        assert await harness.queue.result("1") == {"output": ["a", "b"]}
    assert harness.handler.begun == ["1"]


async def test_a_job_that_is_on_its_way_when_the_loop_stops_runs() -> None:
    harness = LoopHarness()
    harness.queue.take_faults.append(Fault(latency_s=0.02))
    async with harness.running():
        harness.submit("late")
        await asyncio.sleep(0.01)
        harness.loop.stop()

        assert await harness.queue.result("late") == {"output": ["a", "b"]}
    assert harness.queue.taken_late == {"late"}


@pytest.mark.parametrize(("arrives_after_s", "ends_after_s"), [(None, POLL_CANCEL_GRACE_S), (1.5, 1.5)])
@in_virtual_time
async def test_a_take_that_ignores_its_cancellation_may_bring_a_job_until_the_grace_period_ends(
    arrives_after_s: float | None, ends_after_s: float
) -> None:
    harness = LoopHarness(drain_s=25.0)
    harness.queue.take_faults.append(Fault(ignores_cancel=True))
    async with harness.running() as task:
        await asyncio.sleep(0.01)
        stopped_at = time.monotonic()
        harness.loop.stop()
        if arrives_after_s is not None:
            await asyncio.sleep(arrives_after_s)
            harness.submit("1")
            assert await harness.queue.result("1") == {"output": ["a", "b"]}
        assert await task == 0
        assert time.monotonic() - stopped_at == pytest.approx(ends_after_s, abs=0.1)


@pytest.mark.parametrize("failed", [False, True])
@in_virtual_time
async def test_a_job_that_arrives_too_late_to_run_returns_to_the_queue(failed: bool) -> None:
    harness = LoopHarness(drain_s=0.5)
    harness.queue.take_faults.append(Fault(ignores_cancel=True))
    async with harness.running(int(failed)) as task:
        await asyncio.sleep(0.01)
        if failed:
            harness.loop.fail("its process is dead")
        else:
            harness.loop.stop()
            await asyncio.sleep(1.0)
        harness.submit("late")
        assert await task == int(failed)
    assert harness.queue.taken_late == {"late"}
    assert (harness.handler.begun, harness.queue.results, harness.queue.outputs) == ([], [], [])
    # No ping named it: the platform gives it to another worker.
    assert harness.queue.started == set()


@pytest.mark.parametrize("drain_s", [0.0, 25.0])
@in_virtual_time
async def test_the_time_from_stop_to_end_is_bounded_while_no_delivery_succeeds(drain_s: float) -> None:
    harness = LoopHarness(drain_s=drain_s)
    harness.queue.take_faults.extend([Fault(ignores_cancel=True)] * 2)
    harness.queue.down = True
    async with harness.running() as task:
        harness.submit("1", waits=True)
        await asyncio.sleep(1)
        stopped_at = time.monotonic()
        harness.loop.stop()
        await task
        took_s = time.monotonic() - stopped_at
        assert drain_s <= took_s <= drain_s + FINAL_DELIVERY_TIMEOUT_S + ABANDON_TIMEOUT_S


async def test_a_job_that_exceeds_the_drain_timeout_fails_as_retryable_and_keeps_its_outputs() -> None:
    harness = LoopHarness(drain_s=0.05)
    async with harness.running():
        harness.submit("1", waits=True)
        await harness.handler.begins.wait()
        harness.loop.stop()

        error = error_in(await harness.queue.result("1"))
    assert (error["status"], error["retryable"]) == (503, True)
    assert harness.queue.outputs == [("1", "a"), ("1", "b")]
    assert harness.handler.closed == ["1"]


@pytest.mark.parametrize("words", [[], ["b"]])
async def test_a_handler_that_suppresses_its_cancellation_is_aborted(words: list[str]) -> None:
    begins = asyncio.Event()

    async def suppress_cancellation(_job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        yield "a"
        begins.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        for word in words:
            yield word

    harness = LoopHarness(suppress_cancellation, drain_s=0.05)
    async with harness.running():
        harness.submit("1")
        await begins.wait()
        harness.loop.stop()

        assert error_in(await harness.queue.result("1"))["retryable"] is True
    assert harness.queue.outputs == [("1", "a")]


@pytest.mark.parametrize("broken", ["admission", "failure", "a supervised task"])
async def test_a_failed_task_of_the_loop_ends_the_worker_and_its_jobs_as_retryable(
    broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    harness = LoopHarness(limit=1)

    def fail(*_: object) -> Any:
        raise AttributeError("no such attribute")

    async with harness.running(exit_status=1) as task:
        harness.submit("1", waits=True)
        await harness.handler.begins.wait()
        if broken == "admission":
            vars(harness.loop._admission)["available_slots"] = fail
            harness.load_changed.set()
        elif broken == "failure":
            harness.loop._failure = fail
        else:
            harness.loop.supervise(asyncio.to_thread(fail), "something else")

        error = error_in(await harness.queue.result("1"))
        assert await task == 1
    assert (error["status"], error["retryable"]) == (503, True)
    assert "no such attribute" in caplog.text


async def test_a_failed_task_of_a_job_ends_the_worker() -> None:
    """It is unknown how such a job ended: the platform delivers it again when the worker is gone."""
    harness = LoopHarness()
    remove = harness.queue.remove_in_progress

    def fail(job_id: str) -> None:
        remove(job_id)
        raise ZeroDivisionError

    async with harness.running(exit_status=1) as task:
        vars(harness.queue)["remove_in_progress"] = fail
        harness.submit("1")
        assert await task == 1


async def test_a_job_whose_end_cannot_be_logged_does_not_end_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    harness = LoopHarness()

    def fail(_job_id: str) -> None:
        raise ZeroDivisionError

    vars(harness.loop)["_pop_request_stats"] = fail
    async with harness.running():
        for job_id in ("1", "2"):
            harness.submit(job_id)
            assert await harness.queue.result(job_id) == {"output": ["a", "b"]}
    assert "Job 1: its end could not be logged" in caplog.text


@in_virtual_time
async def test_a_job_whose_result_could_not_be_delivered_in_time_is_logged_as_undelivered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "engine")
    harness = LoopHarness(drain_s=1.0)
    harness.queue.post_faults.extend([Fault(), Fault(), Fault(before=DeliveryError("hangs"), latency_s=1000.0)])
    async with harness.running() as task:
        harness.submit("1")
        await harness.handler.closes.wait()
        harness.loop.stop()
        await task
    ended = [json.loads(line) for line in caplog.messages if line.startswith("{")][-1]
    assert (ended["job"], ended["status"]) == ("1", "undelivered")


@in_virtual_time
async def test_an_aborted_job_ends_with_the_reason_whatever_its_handler_raises() -> None:
    async def handler(_job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        try:
            await asyncio.sleep(1000)
            yield "never"
        finally:
            raise ValueError("a bug")

    harness = LoopHarness(handler, execution_s=30.0)
    async with harness.running():
        harness.submit("1")
        await asyncio.sleep(31)
        error = error_in(await harness.queue.result("1"))
    assert error["status"] == 504


@in_virtual_time
async def test_another_worker_is_requested_by_a_job_whose_result_is_not_on_its_way_yet() -> None:
    """The oldest job's result, posted before the engine failed, could not request one."""
    harness = LoopHarness()
    async with harness.running(exit_status=1) as task:
        harness.queue.post_faults.extend([Fault(), Fault(), Fault(latency_s=1.0)])
        harness.submit("oldest")
        await harness.queue.result("oldest")
        harness.submit("younger", waits=True)
        await asyncio.sleep(0.1)
        harness.engine_failure = "dead"
        await task
    assert "stopPod" not in await harness.queue.result("oldest")
    assert (await harness.queue.result("younger"))["stopPod"] is True


@pytest.mark.parametrize("abort", ["stop", "shut down"])
async def test_a_job_that_is_aborted_twice_before_its_task_runs_is_removed(abort: str) -> None:
    harness = LoopHarness()
    task = asyncio.create_task(harness.loop.run())
    await asyncio.sleep(0)
    harness.loop._start_job({"id": "1", "input": {}}, 0.0)
    running = harness.loop._jobs["1"]
    running.abort(JobState.STOPPED if abort == "stop" else JobState.FINISHING)
    running.abort(JobState.ABANDONED)
    harness.loop.stop()

    assert await task == 0
    assert harness.queue.in_progress == set()


async def test_every_task_of_the_loop_has_a_name() -> None:
    harness = LoopHarness()
    async with harness.running():
        harness.submit("1", waits=True)
        await harness.handler.begins.wait()
        names = {task.get_name() for task in asyncio.all_tasks()}
        harness.handler.go.set()
    assert {"take jobs", "watch for stop signals", "watch the engine", "job 1"} <= names


async def test_when_the_engine_fails_all_jobs_fail_as_retryable_and_the_last_result_asks_for_a_new_worker() -> None:
    harness = LoopHarness()
    async with harness.running(exit_status=1):
        for number in range(3):
            harness.submit(str(number), waits=True)
        await harness.handler.begins.wait()
        harness.engine_failure = "the engine's process is dead"
        harness.submit("4")

        results = [await harness.queue.result(str(number)) for number in range(3)]
    assert all(error_in(result)["retryable"] for result in results)
    # The platform may end the worker at once: all other results have arrived by then.
    assert [result.get("stopPod") for result in results] == [True, None, None]
    assert harness.queue.results[-1][0] == "0"


async def test_a_job_that_seems_complete_when_the_engine_fails_is_retryable() -> None:
    """VLLM ends the streams of a dead engine with an error event, and so in good order."""
    harness = LoopHarness()
    async with harness.running(exit_status=1):
        harness.submit("1", waits=True)
        await harness.handler.begins.wait()
        harness.engine_failure = "the engine's process is dead"
        harness.handler.go.set()

        assert error_in(await harness.queue.result("1"))["retryable"] is True


@pytest.mark.parametrize(
    ("steps", "timeout_s"),
    [(0, 60), (2, 60), (None, 60 * FIRST_STEP_FACTOR)],
    ids=["stalled while idle", "stalled while it ran", "stalled before its first step, which may compile kernels"],
)
@in_virtual_time
async def test_a_stalled_engine_fails_all_jobs_as_retryable_and_the_last_result_asks_for_a_new_worker(
    steps: int | None, timeout_s: int
) -> None:
    requests: list[str] = []

    async def run_request(job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Wait for an engine that makes no step; its request is removed when the job is aborted."""
        requests.append(job["id"])
        try:
            yield "a"
            await asyncio.Event().wait()
        finally:
            requests.remove(job["id"])

    engine = object.__new__(VLLMEngine)  # Its constructor would load vLLM.
    engine.statistics, engine._stall_timeout_s, engine._idle_at = Statistics(), 60.0, 0.0
    engine._engine = SimpleNamespace(errored=False, get_num_unfinished_requests=lambda: len(requests))
    harness = LoopHarness(run_request, failure=engine.failure)

    async with harness.running(exit_status=1):
        await asyncio.sleep(1)
        if steps is not None:
            engine.statistics.on_step(0)
        # Without a request there is no step to wait for.
        await asyncio.sleep(1000)
        for number in range(3):
            harness.submit(str(number))
        await asyncio.sleep(timeout_s - 1)
        for _ in range(steps or 0):
            engine.statistics.on_step(0)
            await asyncio.sleep(timeout_s - 1)
        assert not harness.queue.results
        for number in range(3):
            result = await harness.queue.result(str(number))
            assert f"no step for {timeout_s} s while 3 requests run" in error_in(result)["error"]["message"]
            assert error_in(result)["retryable"] is True
        assert [result.get("stopPod") for _, result in harness.queue.results] == [None, None, True]
        assert not requests
