"""The loop: what it takes, when it starts, and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from engine.backend.statistics import Statistics
from engine.backend.vllm_engine import FIRST_STEP_FACTOR, VLLMEngine
from engine.errors import DeliveryError, RateLimitedError, RefusedDeliveryError
from engine.queue.admission import Admission
from engine.queue.backoff import RATE_LIMIT_WAIT_S
from engine.queue.job_loop import ABANDON_TIMEOUT_S, FINAL_DELIVERY_TIMEOUT_S, JobLoop, Timeouts
from engine.queue.protocol import POLL_CANCEL_GRACE_S, PostKind
from tests import virtual_time
from tests.unit.queue.test_admission import Load

pytestmark = pytest.mark.anyio
SECRET_URL = "https://platform.example/job-take/worker?key=secret"  # noqa: S105 (so that it can be looked for)
REQUEST = aiohttp.RequestInfo(URL(SECRET_URL), "GET", CIMultiDictProxy(CIMultiDict()), URL(SECRET_URL))


class Queue:
    """The platform in memory: `engine.queue.job_loop.Platform`."""

    def __init__(self) -> None:
        self.waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.to_stop: asyncio.Queue[str] = asyncio.Queue()
        self.asked: list[int] = []
        self.errors: list[Exception] = []
        self.held: set[str] = set()
        self.ever_held: set[str] = set()
        self.down = False
        self.streamed: list[tuple[str, Any]] = []
        self.results: dict[str, dict[str, Any]] = {}
        self.done = asyncio.Event()
        self.free = asyncio.Event()
        self.refuses = False
        self.late: dict[str, Any] | None = None

    async def take(self, count: int) -> list[dict[str, Any]]:
        self.asked.append(count)
        self.free.clear()
        if self.errors:
            raise self.errors.pop(0)
        getting = asyncio.ensure_future(self.waiting.get())
        freed = asyncio.ensure_future(self.free.wait())
        await asyncio.wait({getting, freed}, return_when=asyncio.FIRST_COMPLETED)
        freed.cancel()
        if not getting.done():
            getting.cancel()
            return [] if self.late is None else [self.late]
        jobs = [getting.result()]
        while len(jobs) < count and not self.waiting.empty():
            jobs.append(self.waiting.get_nowait())
        return jobs

    def stop_polling(self) -> None:
        self.free.set()

    async def stop_signals(self) -> list[str]:
        return [await self.to_stop.get()]

    async def post(self, kind: PostKind, job_id: str, body: bytes) -> None:
        if self.down:
            await asyncio.sleep(1)
            raise DeliveryError("down")
        document = json.loads(body)
        if kind is PostKind.OUTPUT:
            if self.refuses:
                raise RefusedDeliveryError("status 400: not held")
            self.streamed.append((job_id, document["output"]))
        else:
            assert job_id in self.held
            assert job_id not in self.results
            self.results[job_id] = document
            self.done.set()

    def add_in_progress(self, job_id: str) -> None:
        self.held.add(job_id)
        self.ever_held.add(job_id)

    def remove_in_progress(self, job_id: str) -> None:
        self.held.remove(job_id)

    async def result(self, job_id: str) -> dict[str, Any]:
        async with asyncio.timeout(10):
            while job_id not in self.results:
                self.done.clear()
                await self.done.wait()
        return self.results[job_id]


class Work:
    """A handler that says `words`, one after the other, and then waits for `go` if it was asked to."""

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


class Bench:
    """A loop with all that it acts on."""

    def __init__(
        self, limit: int = 8, cache_tokens: int = 10**6, queue: Queue | None = None, **timeouts: float
    ) -> None:
        self.queue, self.work, self.load = queue or Queue(), Work(), Load()
        self.broken: str | None = None
        self.load_changed = asyncio.Event()
        admission = Admission(self.load, limit, cache_tokens)
        self.loop = JobLoop(
            self.queue,
            self.work,
            admission,
            load_changed=self.load_changed,
            failure=lambda: self.broken,
            timeouts=Timeouts(**timeouts),
        )

    def submit(self, job_id: str, **value: Any) -> None:
        self.queue.waiting.put_nowait({"id": job_id, "input": value})


@asynccontextmanager
async def running(bench: Bench, status: int = 0) -> AsyncIterator[asyncio.Task[int]]:
    """The loop while the block lasts; it is stopped after, and has to end with this status and leave nothing."""
    before = asyncio.all_tasks()
    task = asyncio.create_task(bench.loop.run())
    yield task
    bench.loop.stop()
    async with asyncio.timeout(20):
        assert await task == status
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert bench.queue.held == set()


def error_of(result: dict[str, Any]) -> dict[str, Any]:
    document = json.loads(result["error"])
    assert isinstance(document, dict)
    return document


async def test_a_jobs_outputs_are_streamed_and_its_result_holds_them() -> None:
    bench = Bench()
    async with running(bench):
        bench.submit("1")

        assert await bench.queue.result("1") == {"output": ["a", "b"]}
        assert bench.queue.streamed == [("1", "a"), ("1", "b")]


async def test_the_first_job_of_a_take_is_not_kept_waiting_by_the_others() -> None:
    bench = Bench()
    steps: list[str] = []

    async def prepared(job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        steps.append(f"{job['id']} begins")
        await asyncio.sleep(0)
        steps.append(f"{job['id']} is prepared")
        yield job["id"]

    bench.loop._handler = prepared
    for number in range(3):
        bench.submit(str(number))
    async with running(bench):
        await bench.queue.result("2")

    assert bench.queue.asked[0] >= 3
    assert steps == [f"{number} {what}" for number in range(3) for what in ("begins", "is prepared")]


async def test_only_what_the_engine_has_room_for_is_asked_for() -> None:
    bench = Bench(limit=2)
    async with running(bench):
        for number in range(3):
            bench.submit(str(number), waits=True)
        await bench.work.begins.wait()
        await asyncio.sleep(0.01)
        assert sorted(bench.work.begun) == ["0", "1"]
        assert bench.queue.waiting.qsize() == 1

        bench.work.go.set()
        await bench.queue.result("2")
    assert bench.queue.asked[0] == 2


def test_a_freed_slot_is_asked_for_at_once() -> None:
    bench = Bench(limit=1)

    async def free_a_slot() -> None:
        async with running(bench):
            bench.submit("1", waits=True)
            bench.submit("2")
            await bench.work.begins.wait()
            bench.work.go.set()
            freed_at = time.monotonic()
            await bench.queue.result("2")
            # Some turns of the loop, and no pause.
            assert time.monotonic() - freed_at < 0.001

    with virtual_time.runner() as runner:
        runner.run(free_a_slot())


async def test_the_engines_word_lets_more_jobs_in_while_jobs_run() -> None:
    bench = Bench(limit=8, cache_tokens=1000)
    async with running(bench):
        bench.submit("1", waits=True)
        bench.submit("2")
        await bench.work.begins.wait()
        await asyncio.sleep(0.01)
        assert bench.work.begun == ["1"]

        bench.load.running, bench.load.kv_cache_usage, bench.load.avg_running_output_tokens = 1, 0.1, 400
        bench.load_changed.set()

        await bench.queue.result("2")
        bench.work.go.set()


async def test_takes_that_fail_are_paced_and_do_not_end_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.queue.errors = [ConnectionError("down"), ValueError("nonsense"), RuntimeError("status 500")]
    async with running(bench):
        bench.submit("1")
        await bench.queue.result("1")
    assert "down" in caplog.text
    assert len(bench.queue.asked) >= 4


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ClientResponseError(REQUEST, (), status=502, message="Bad Gateway"),
        aiohttp.InvalidURL(SECRET_URL),
        RuntimeError(f"GET {SECRET_URL}: nothing came"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_take_that_fails_is_told_without_its_url(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.queue.errors = [error]
    async with running(bench):
        bench.submit("1")
        await bench.queue.result("1")
    assert type(error).__name__ in caplog.text
    assert "secret" not in caplog.text
    assert isinstance(error, aiohttp.InvalidURL) or "502" in caplog.text or "nothing came" in caplog.text


def test_a_platform_that_limits_requests_is_asked_again_after_five_seconds(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.queue.errors = [RateLimitedError("wait")]

    async def leave_alone() -> None:
        async with running(bench):
            bench.submit("1")
            await asyncio.sleep(RATE_LIMIT_WAIT_S - 0.01)
            assert len(bench.queue.asked) == 1
            await bench.queue.result("1")
            assert time.monotonic() < RATE_LIMIT_WAIT_S + 0.01

    with virtual_time.runner() as runner:
        runner.run(leave_alone())
    assert "Polling for jobs failed: wait; next attempt in 5 s" in caplog.messages


async def test_an_answer_with_an_error_in_it_is_an_output_and_the_job_is_completed() -> None:
    bench = Bench()
    answer = {"object": "response", "error": {"message": "cut"}}
    async with running(bench):
        bench.submit("1", words=[answer, {"error": {"message": "no text"}}])

        assert await bench.queue.result("1") == {"output": [answer, {"error": {"message": "no text"}}]}


def test_a_job_that_is_offered_again_and_again_while_it_runs_is_not_asked_for_without_a_pause() -> None:
    bench = Bench()

    async def offer(count: int) -> list[dict[str, Any]]:
        bench.queue.asked.append(count)
        return [{"id": "1", "input": {"waits": True}}]

    bench.queue.take = offer  # type: ignore[method-assign]

    async def run() -> None:
        async with running(bench):
            await asyncio.sleep(60)
            bench.loop.stop()
            bench.work.go.set()

    with virtual_time.runner() as runner:
        runner.run(run())
    assert 60 < len(bench.queue.asked) < 150
    assert bench.work.begun == ["1"]


async def test_a_bad_entry_of_a_batch_does_not_lose_the_others(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    entries: list[Any] = [None, "a text", {"input": {}}, {"id": None}, [], {"id": {}}, {"id": "\ud800"}, {"id": ""}]
    for entry in entries:
        bench.queue.waiting.put_nowait(entry)
    bench.submit("1")
    async with running(bench):
        assert await bench.queue.result("1") == {"output": ["a", "b"]}
    assert caplog.text.count("Skipping a malformed job") == len(entries)


async def test_the_log_names_the_batch_of_a_job(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench()
    async with running(bench):
        bench.queue.waiting.put_nowait({"id": "1", "input": {}, "batchId": "batch-7"})
        await bench.queue.result("1")
    lines = [json.loads(line) for record in caplog.records if (line := record.getMessage()).startswith("{")]
    assert [(line["job"], line["batchId"]) for line in lines] == [("1", "batch-7")] * 2


async def test_an_input_that_is_too_deep_to_be_logged_is_run_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench()
    bench.loop = JobLoop(bench.queue, bench.work, Admission(bench.load, 8, 10**6), log_inputs=True)
    value: dict[str, Any] = {}
    for _ in range(5000):
        value = {"deeper": value}
    async with running(bench):
        bench.queue.waiting.put_nowait({"id": "1", "input": {"words": ["a"], "deep": value}})
        assert await bench.queue.result("1") == {"output": ["a"]}
    assert '"input": "nested too deeply"' in caplog.text
    while value:  # taken apart from outside in: freeing it in one go would recurse as deeply
        value = value.pop("deeper", {})


@pytest.mark.parametrize(
    ("value", "route"),
    [
        ({"openai_route": "/v1/models?key=my-words"}, "/v1/models"),
        ({"route": "/tokenize"}, "/tokenize"),
        ({"openai_route": ["my-words"]}, None),
        ({"openai_route": "/my-words" * 20}, None),
        ({"prompt": "my-words"}, "native"),
        ("my-words", None),
    ],
)
async def test_the_log_shows_a_plain_route_and_no_other_words_of_a_client(
    value: Any, route: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench()

    async def say(_job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        yield "a"

    bench.loop = JobLoop(bench.queue, say, Admission(bench.load, 8, 10**6))
    async with running(bench):
        bench.queue.waiting.put_nowait({"id": "1", "input": value})
        await bench.queue.result("1")
    lines = [json.loads(line) for record in caplog.records if (line := record.getMessage()).startswith("{")]
    assert [line["route"] for line in lines] == [route, route]
    assert "my-words" not in caplog.text


async def test_a_job_whose_result_could_not_be_delivered_is_not_completed_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench()

    async def refuse(_kind: PostKind, _job_id: str, _body: bytes) -> None:
        raise RefusedDeliveryError("status 404")

    bench.queue.post = refuse  # type: ignore[method-assign, assignment]
    async with running(bench):
        bench.submit("1", words=[])
        await bench.work.closes.wait()
    assert '"status": "undelivered"' in caplog.text
    assert "completed" not in caplog.text


async def test_a_job_that_comes_again_while_it_runs_is_not_run_twice() -> None:
    bench = Bench()
    async with running(bench):
        bench.submit("1", waits=True)
        bench.submit("1", waits=True)
        bench.submit("2")
        await bench.queue.result("2")
        bench.work.go.set()
        await bench.queue.result("1")
    assert sorted(bench.work.begun) == ["1", "2"]


async def test_a_stopped_job_is_closed_and_nothing_is_posted_for_it() -> None:
    bench = Bench()
    async with running(bench):
        bench.submit("1", waits=True)
        bench.submit("2", waits=True)
        await bench.work.begins.wait()
        bench.queue.to_stop.put_nowait("unknown")
        bench.queue.to_stop.put_nowait("1")
        await bench.work.closes.wait()
        bench.work.go.set()
        assert await bench.queue.result("2") == {"output": ["a", "b"]}
    assert "1" not in bench.queue.results
    assert bench.work.closed == ["1", "2"]


@pytest.mark.parametrize("stopped_again", [False, True])
async def test_a_job_that_is_retried_while_its_stopped_run_is_closing_is_run_again(stopped_again: bool) -> None:
    bench = Bench()
    closing, closed = asyncio.Event(), asyncio.Event()

    async def slow_to_close(job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        bench.work.begun.append(job["id"])
        try:
            yield "a"
            if not closing.is_set():
                await asyncio.Event().wait()
        finally:
            closing.set()
            await closed.wait()

    bench.loop = JobLoop(bench.queue, slow_to_close, Admission(bench.load, 8, 10**6))
    async with running(bench):
        bench.submit("1")
        await asyncio.sleep(0.01)
        bench.queue.to_stop.put_nowait("1")
        await closing.wait()
        bench.submit("1")
        bench.submit("1")
        await asyncio.sleep(0.01)
        if stopped_again:
            bench.queue.to_stop.put_nowait("1")
            await asyncio.sleep(0.01)
        assert bench.work.begun == ["1"]

        closed.set()

        if not stopped_again:
            assert await bench.queue.result("1") == {"output": ["a"]}
    assert bench.work.begun == ["1"] * (1 if stopped_again else 2)


async def test_a_job_that_is_retried_before_the_platforms_word_on_its_result_is_here_is_run_again() -> None:
    bench = Bench()
    heard, post = asyncio.Event(), bench.queue.post

    async def post_slowly(kind: PostKind, job_id: str, body: bytes) -> None:
        await post(kind, job_id, body)
        if kind is PostKind.RESULT:
            await heard.wait()

    bench.queue.post = post_slowly  # type: ignore[method-assign]
    async with running(bench):
        bench.submit("1", fails=True)
        assert "error" in await bench.queue.result("1")
        del bench.queue.results["1"]
        bench.submit("1")
        await asyncio.sleep(0.01)
        heard.set()

        assert await bench.queue.result("1") == {"output": ["a", "b"]}


async def test_a_job_that_is_stopped_before_its_first_turn_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(limit=1)

    def add_in_progress(job_id: str) -> None:
        bench.queue.held.add(job_id)
        if job_id == "1":
            bench.queue.to_stop.put_nowait(job_id)

    monkeypatch.setattr(bench.queue, "add_in_progress", add_in_progress)
    async with running(bench):
        await asyncio.sleep(0.01)
        bench.submit("1")
        bench.submit("2")
        assert await bench.queue.result("2") == {"output": ["a", "b"]}
    assert bench.work.begun == ["2"]
    assert "1" not in bench.queue.results


async def test_an_error_of_the_handler_is_the_result_as_it_is() -> None:
    bench = Bench()
    async with running(bench):
        bench.submit("1", error='{"error": 5}')

        assert await bench.queue.result("1") == {"error": '{"error": 5}'}


async def test_a_handler_that_raises_ends_its_job_with_a_parseable_error() -> None:
    bench = Bench()
    async with running(bench):
        bench.submit("1", fails=True)

        assert error_of(await bench.queue.result("1"))["status"] == 500


async def test_a_refused_output_ends_the_work_and_the_job() -> None:
    bench = Bench()
    bench.queue.refuses = True
    async with running(bench):
        bench.submit("1", waits=True)

        assert "refused the output" in error_of(await bench.queue.result("1"))["error"]["message"]
        assert bench.work.closed == ["1"]


async def test_when_it_is_told_to_stop_what_runs_may_end() -> None:
    bench = Bench()
    async with running(bench):
        bench.submit("1", waits=True)
        await bench.work.begins.wait()
        bench.loop.stop()
        await bench.queue.free.wait()
        await asyncio.sleep(0.01)
        bench.submit("2")
        bench.work.go.set()

        assert await bench.queue.result("1") == {"output": ["a", "b"]}
    assert bench.work.begun == ["1"]


async def test_a_job_that_the_last_take_brings_is_run() -> None:
    bench = Bench()
    bench.queue.late = {"id": "late", "input": {}}
    async with running(bench):
        await asyncio.sleep(0.01)
        bench.loop.stop()

        assert await bench.queue.result("late") == {"output": ["a", "b"]}


class HeldOpen(Queue):
    """A platform that does not close a take that was let go, and gives it a job if one comes."""

    async def take(self, count: int) -> list[dict[str, Any]]:
        self.asked.append(count)
        return [await self.waiting.get()]


@pytest.mark.parametrize(("came_s", "ended_s"), [(None, POLL_CANCEL_GRACE_S), (1.5, 1.5)])
def test_a_take_that_the_platform_does_not_close_is_cut_off_and_may_bring_a_job_until_then(
    came_s: float | None, ended_s: float
) -> None:
    bench = Bench(queue=HeldOpen(), drain_s=25.0)

    async def drain() -> None:
        async with running(bench) as task:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            bench.loop.stop()
            if came_s is not None:
                await asyncio.sleep(came_s)
                bench.submit("1")
                assert await bench.queue.result("1") == {"output": ["a", "b"]}
            assert await task == 0
            assert time.monotonic() == pytest.approx(ended_s, abs=0.1)

    with virtual_time.runner() as runner:
        runner.run(drain())


@pytest.mark.parametrize("failed", [False, True])
def test_a_job_that_comes_too_late_to_be_run_goes_back_to_the_queue_untouched(failed: bool) -> None:
    bench = Bench(queue=HeldOpen(), drain_s=0.5)

    async def end() -> None:
        async with running(bench, int(failed)) as task:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if failed:
                bench.loop.fail("its process is dead")
            else:
                bench.loop.stop()
                await asyncio.sleep(1.0)
            bench.submit("late")
            assert await task == int(failed)

    with virtual_time.runner() as runner:
        runner.run(end())
    assert (bench.work.begun, bench.queue.results, bench.queue.streamed) == ([], {}, [])
    # It was never named by a ping: the platform gives it to another worker.
    assert bench.queue.ever_held == set()


@pytest.mark.parametrize("drain_s", [0.0, 25.0])
def test_the_time_from_the_signal_to_the_end_is_bounded_though_nothing_can_be_delivered(drain_s: float) -> None:
    bench = Bench(queue=HeldOpen(), drain_s=drain_s)
    bench.queue.down = True

    async def drain() -> None:
        async with running(bench) as task:
            bench.submit("1", waits=True)
            await asyncio.sleep(1)
            begun = time.monotonic()
            bench.loop.stop()
            await task
            assert drain_s <= time.monotonic() - begun <= drain_s + FINAL_DELIVERY_TIMEOUT_S + ABANDON_TIMEOUT_S

    with virtual_time.runner() as runner:
        runner.run(drain())


@pytest.mark.parametrize("broken", ["admission", "failure", "a supervised task"])
async def test_a_task_of_the_loop_that_fails_ends_the_worker_and_its_jobs_as_retryable(
    broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(limit=1)

    def fail(*_: object) -> Any:
        raise AttributeError("no such attribute")

    async with running(bench, 1) as task:
        bench.submit("1", waits=True)
        await bench.work.begins.wait()
        if broken == "admission":
            vars(bench.loop._admission)["available_slots"] = fail
            bench.load_changed.set()
        elif broken == "failure":
            bench.loop._failure = fail
        else:
            bench.loop.supervise(asyncio.to_thread(fail), "something else")

        error = error_of(await bench.queue.result("1"))
        assert await task == 1
    assert (error["status"], error["retryable"]) == (503, True)
    assert "no such attribute" in caplog.text


async def test_a_job_whose_task_fails_ends_the_worker() -> None:
    """It cannot be told how such a job ended: the platform gives it out again when the worker is gone."""
    bench = Bench()

    async with running(bench, 1) as task:
        vars(bench.queue)["remove_in_progress"] = lambda job_id: fail_now(bench.queue.held.remove(job_id))
        bench.submit("1")
        assert await task == 1


def fail_now(*_: object) -> Any:
    raise ZeroDivisionError


async def test_every_task_of_the_loop_has_a_name() -> None:
    bench = Bench()
    async with running(bench):
        bench.submit("1", waits=True)
        await bench.work.begins.wait()
        names = {task.get_name() for task in asyncio.all_tasks()}
        bench.work.go.set()
    assert {"take jobs", "watch for stop signals", "watch the engine", "job 1"} <= names


def test_a_job_that_never_ends_is_ended_after_as_long_as_a_job_may_run() -> None:
    bench = Bench(execution_s=30.0)

    async def run() -> None:
        async with running(bench):
            begun = time.monotonic()
            bench.submit("endless", waits=True)
            await asyncio.sleep(10)
            bench.submit("quick")
            assert await bench.queue.result("quick") == {"output": ["a", "b"]}
            await asyncio.sleep(19)
            assert "endless" not in bench.queue.results
            error = error_of(await bench.queue.result("endless"))
            assert time.monotonic() - begun == pytest.approx(30, abs=0.1)
            assert (error["status"], error["retryable"]) == (504, False)
            assert "EXECUTION_TIMEOUT_S" in error["error"]["message"]
            assert bench.work.closed == ["quick", "endless"]

    with virtual_time.runner() as runner:
        runner.run(run())


async def test_what_does_not_end_in_time_ends_as_retryable_and_keeps_what_was_streamed() -> None:
    bench = Bench(drain_s=0.05)
    async with running(bench):
        bench.submit("1", waits=True)
        await bench.work.begins.wait()
        bench.loop.stop()

        error = error_of(await bench.queue.result("1"))
    assert (error["status"], error["retryable"]) == (503, True)
    assert bench.queue.streamed == [("1", "a"), ("1", "b")]
    assert bench.work.closed == ["1"]


@pytest.mark.parametrize("words", [[], ["b"]])
async def test_a_handler_that_keeps_its_cancellation_to_itself_is_broken_off_all_the_same(words: list[str]) -> None:
    bench = Bench()
    begins = asyncio.Event()

    async def stubborn(_job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        yield "a"
        begins.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        for word in words:
            yield word

    bench.loop = JobLoop(bench.queue, stubborn, Admission(bench.load, 8, 8), timeouts=Timeouts(drain_s=0.05))
    async with running(bench):
        bench.submit("1")
        await begins.wait()
        bench.loop.stop()

        assert error_of(await bench.queue.result("1"))["retryable"] is True
    assert bench.queue.streamed == [("1", "a")]


async def test_when_the_engine_fails_all_jobs_end_as_retryable_and_the_platform_is_told() -> None:
    bench = Bench()
    async with running(bench, status=1):
        for number in range(3):
            bench.submit(str(number), waits=True)
        await bench.work.begins.wait()
        bench.broken = "the engine's process is dead"
        bench.submit("4")

        results = [await bench.queue.result(str(number)) for number in range(3)]
    assert all(error_of(result)["retryable"] for result in results)
    # Whoever acts on it at once has heard of all of them.
    assert [result.get("stopPod") for result in results] == [True, None, None]
    assert list(bench.queue.results)[-1] == "0"


async def test_a_job_that_seems_complete_as_the_engine_fails_is_retryable_too() -> None:
    """VLLM ends the streams of a dead engine with an error event, and so in good order."""
    bench = Bench()
    async with running(bench, status=1):
        bench.submit("1", waits=True)
        await bench.work.begins.wait()
        bench.broken = "the engine's process is dead"
        bench.work.go.set()

        assert error_of(await bench.queue.result("1"))["retryable"] is True


@pytest.mark.parametrize(
    ("steps", "stalled_s"),
    [(0, 60), (2, 60), (None, 60 * FIRST_STEP_FACTOR)],
    ids=["hung while idle", "hung while it ran", "hung before its first step, which may compile kernels"],
)
def test_an_engine_that_makes_no_step_ends_all_jobs_as_retryable_and_the_platform_is_told(
    steps: int | None, stalled_s: int
) -> None:
    requests: list[str] = []
    engine = SimpleNamespace(errored=False, get_num_unfinished_requests=lambda: len(requests))

    async def work(job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """What a job leaves behind as it is broken off: its request is aborted, though nothing steps any more."""
        requests.append(job["id"])
        try:
            yield "a"
            await asyncio.Event().wait()
        finally:
            requests.remove(job["id"])

    server = object.__new__(VLLMEngine)  # Its constructor would load vLLM.
    server.statistics, server._stall_timeout_s, server._engine, server._idle_at = Statistics(), 60.0, engine, 0.0
    bench = Bench()
    bench.loop = JobLoop(bench.queue, work, Admission(bench.load, 8, 10**6), failure=server.failure)

    async def stall() -> None:
        async with running(bench, status=1):
            await asyncio.sleep(1)
            if steps is not None:
                server.statistics.on_step(0)
            # Without a request there is no step to wait for.
            await asyncio.sleep(1000)
            for number in range(3):
                bench.submit(str(number))
            await asyncio.sleep(stalled_s - 1)
            for _ in range(steps or 0):
                server.statistics.on_step(0)
                await asyncio.sleep(stalled_s - 1)
            assert not bench.queue.results
            for number in range(3):
                result = await bench.queue.result(str(number))
                assert f"no step for {stalled_s} s while 3 requests run" in error_of(result)["error"]["message"]
                assert error_of(result)["retryable"] is True
            assert [result.get("stopPod") for result in bench.queue.results.values()] == [None, None, True]
            assert not requests

    with virtual_time.runner() as runner:
        runner.run(stall())
