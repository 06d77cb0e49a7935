"""The job loop takes jobs: as many as there is room for, without losing or repeating one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from engine.errors import RateLimitedError
from engine.queue.backoff import RATE_LIMIT_WAIT_S
from tests.fake_job_queue import NO_FAULT, Fault
from tests.unit.queue.fakes import LoopHarness
from tests.virtual_time import in_virtual_time

pytestmark = pytest.mark.anyio
SECRET_URL = "https://platform.example/job-take/worker?key=secret"  # noqa: S105 (so that it can be looked for)
REQUEST = aiohttp.RequestInfo(URL(SECRET_URL), "GET", CIMultiDictProxy(CIMultiDict()), URL(SECRET_URL))


async def test_jobs_of_one_take_start_one_after_the_other() -> None:
    """Started together, the first would wait until the last is prepared."""
    steps: list[str] = []

    async def prepare(job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        steps.append(f"{job['id']} begins")
        await asyncio.sleep(0)
        steps.append(f"{job['id']} is prepared")
        yield job["id"]

    harness = LoopHarness(prepare)
    for number in range(3):
        harness.submit(str(number))
    async with harness.running():
        await harness.queue.result("2")

    assert harness.queue.take_counts[0] >= 3
    assert steps == [f"{number} {what}" for number in range(3) for what in ("begins", "is prepared")]


async def test_no_more_jobs_are_taken_than_the_engine_has_room_for() -> None:
    harness = LoopHarness(limit=2)
    async with harness.running():
        for number in range(3):
            harness.submit(str(number), waits=True)
        await harness.handler.begins.wait()
        await asyncio.sleep(0.01)
        assert sorted(harness.handler.begun) == ["0", "1"]
        assert len(harness.queue.waiting) == 1

        harness.handler.go.set()
        await harness.queue.result("2")
    assert harness.queue.take_counts[0] == 2


@in_virtual_time
async def test_a_free_slot_is_filled_at_once() -> None:
    harness = LoopHarness(limit=1)
    async with harness.running():
        harness.submit("1", waits=True)
        harness.submit("2")
        await harness.handler.begins.wait()
        harness.handler.go.set()
        freed_at = time.monotonic()
        await harness.queue.result("2")
        # A few turns of the event loop, and no sleep.
        assert time.monotonic() - freed_at < 0.001


async def test_a_change_of_the_load_admits_more_jobs_while_others_run() -> None:
    harness = LoopHarness(limit=8, cache_tokens=1000)
    async with harness.running():
        harness.submit("1", waits=True)
        harness.submit("2")
        await harness.handler.begins.wait()
        await asyncio.sleep(0.01)
        assert harness.handler.begun == ["1"]

        harness.load.running, harness.load.kv_cache_usage, harness.load.avg_running_output_tokens = 1, 0.1, 400
        harness.load_changed.set()

        await harness.queue.result("2")
        harness.handler.go.set()


async def test_failed_takes_are_repeated(caplog: pytest.LogCaptureFixture) -> None:
    harness = LoopHarness()
    errors = [ConnectionError("down"), ValueError("nonsense"), RuntimeError("status 500")]
    harness.queue.take_faults.extend(Fault(before=error) for error in errors)
    async with harness.running():
        harness.submit("1")
        await harness.queue.result("1")
    assert "down" in caplog.text
    assert len(harness.queue.take_counts) >= 4


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ClientResponseError(REQUEST, (), status=502, message="Bad Gateway"),
        aiohttp.InvalidURL(SECRET_URL),
        RuntimeError(f"GET {SECRET_URL}: nothing came"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_failed_take_is_logged_without_its_url(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    harness = LoopHarness()
    harness.queue.take_faults.append(Fault(before=error))
    async with harness.running():
        harness.submit("1")
        await harness.queue.result("1")
    assert type(error).__name__ in caplog.text
    assert "secret" not in caplog.text
    assert isinstance(error, aiohttp.InvalidURL) or "502" in caplog.text or "nothing came" in caplog.text


@in_virtual_time
async def test_after_a_rate_limit_the_next_take_is_five_seconds_later(caplog: pytest.LogCaptureFixture) -> None:
    harness = LoopHarness()
    harness.queue.take_faults.append(Fault(before=RateLimitedError("wait")))
    async with harness.running():
        harness.submit("1")
        await asyncio.sleep(RATE_LIMIT_WAIT_S - 0.01)
        assert len(harness.queue.take_counts) == 1
        await harness.queue.result("1")
        assert time.monotonic() < RATE_LIMIT_WAIT_S + 0.01
    assert "Polling for jobs failed: wait; next attempt in 5 s" in caplog.messages


@in_virtual_time
async def test_takes_that_bring_only_a_running_job_are_slowed_down() -> None:
    harness = LoopHarness()
    takes = 0

    async def redeliver(count: int) -> list[Any]:
        del count
        nonlocal takes
        takes += 1
        return [{"id": "1", "input": {"waits": True}}]

    harness.queue.take = redeliver  # type: ignore[method-assign]
    async with harness.running():
        await asyncio.sleep(60)
        harness.loop.stop()
        harness.handler.go.set()
    assert 60 < takes < 150
    assert harness.handler.begun == ["1"]


async def test_malformed_jobs_are_skipped_and_the_others_of_their_take_run(caplog: pytest.LogCaptureFixture) -> None:
    harness = LoopHarness()
    malformed: list[Any] = [None, "a text", {"input": {}}, {"id": None}, [], {"id": {}}, {"id": "\ud800"}, {"id": ""}]
    for entry in malformed:
        harness.queue.submit(entry)
    harness.submit("1")
    async with harness.running():
        assert await harness.queue.result("1") == {"output": ["a", "b"]}
    assert caplog.text.count("Skipping a malformed job") == len(malformed)


async def test_a_job_that_is_redelivered_while_it_runs_runs_once() -> None:
    harness = LoopHarness()
    async with harness.running():
        harness.submit("1", waits=True)
        harness.submit("1", waits=True)
        harness.submit("2")
        await harness.queue.result("2")
        harness.handler.go.set()
        await harness.queue.result("1")
    assert sorted(harness.handler.begun) == ["1", "2"]


@pytest.mark.parametrize("stopped_again", [False, True])
async def test_a_job_that_is_retried_while_its_stopped_run_closes_runs_again(stopped_again: bool) -> None:
    begun: list[str] = []
    closing, closed = asyncio.Event(), asyncio.Event()

    async def close_slowly(job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        begun.append(job["id"])
        try:
            yield "a"
            if not closing.is_set():
                await asyncio.Event().wait()
        finally:
            closing.set()
            await closed.wait()

    harness = LoopHarness(close_slowly)
    async with harness.running():
        harness.submit("1")
        await asyncio.sleep(0.01)
        harness.queue.stop("1")
        await closing.wait()
        harness.submit("1")
        harness.submit("1")
        await asyncio.sleep(0.01)
        if stopped_again:
            harness.queue.stop("1")
            await asyncio.sleep(0.01)
        assert begun == ["1"]

        closed.set()

        if not stopped_again:
            assert await harness.queue.result("1") == {"output": ["a"]}
    assert begun == ["1"] * (1 if stopped_again else 2)


async def test_a_job_that_is_retried_before_its_result_is_acknowledged_runs_again() -> None:
    harness = LoopHarness()
    harness.queue.post_faults.extend([NO_FAULT, NO_FAULT, Fault(latency_s=0.02)])
    async with harness.running():
        harness.submit("1", fails=True)
        assert "error" in await harness.queue.result("1")
        harness.submit("1")

        assert await harness.queue.result("1", run=2) == {"output": ["a", "b"]}
