"""Any order of jobs, stops, failures and ends leaves no job without an end and no task behind."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import delivery, jobs
from engine import loop as loop_module
from engine.errors import BusyError, DeliveryError, RefusedDeliveryError
from engine.platform import Delivery
from tests.scripted import ScriptedApp, chat_chunks
from tests.unit.test_loop import Bench

IDS = ["a", "b", "c", "d"]
WORK = st.fixed_dictionaries(
    {}, optional={"waits": st.booleans(), "fails": st.just(value=True), "error": st.just("{}")}
)
STEPS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(IDS), WORK),
    st.tuples(st.just("stop job"), st.sampled_from([*IDS, "unknown"])),
    st.tuples(st.just("take fails"), st.sampled_from([ConnectionError("x"), BusyError("x"), ValueError("x")])),
    st.tuples(st.just("delivery fails"), st.sampled_from([DeliveryError("x"), RefusedDeliveryError("x")])),
    st.tuples(st.just("go")),
    st.tuples(st.just("tick"), st.integers(1, 5)),
    st.tuples(st.just("load"), st.integers(0, 3), st.integers(0, 2), st.floats(0, 1)),
    st.tuples(st.sampled_from(["stop", "stop", "break", "late job"])),
)


class Trial(Bench):
    """A loop whose deliveries can be made to fail, and which is driven step by step."""

    def __init__(self) -> None:
        super().__init__(limit=3, cache_tokens=2500, drain_s=0.02, job_s=0.02)
        self.fates: list[Exception] = []
        self.results: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.told: set[str] = set()
        post = self.queue.post

        async def failing(kind: Delivery, job_id: str, body: bytes) -> None:
            if self.fates:
                self.refused[job_id] += 1
                raise self.fates.pop()
            if kind is Delivery.RESULT:
                self.results[job_id] += 1
                self.queue.results.pop(job_id, None)
            await post(kind, job_id, body)

        self.queue.post = failing  # type: ignore[method-assign]  # the rest of it is as in the other tests

    async def step(self, name: str, *what: Any) -> None:  # noqa: C901 (a line or two a step)
        match name:
            case "submit":
                self.submit(what[0], **what[1])
            case "stop job":
                self.told.add(what[0])
                self.queue.to_stop.put_nowait(what[0])
            case "take fails":
                self.queue.errors.append(what[0])
            case "delivery fails":
                self.fates.append(what[0])
            case "go":
                self.work.go.set()
            case "tick":
                for _ in range(what[0]):
                    await asyncio.sleep(0)
            case "load":
                self.load.running, self.load.waiting, self.load.kv_cache_usage = what
                self.loop.wake()
            case "stop":
                self.loop.stop()
            case "break":
                self.broken = "it is dead"
            case "late job":
                self.queue.late = {"id": "late", "input": {}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in [(delivery, "_FIRST_WAIT_S"), (delivery, "_LONGEST_WAIT_S"), (loop_module, "_WATCH_S"),
                         (loop_module, "BUSY_WAIT_S"), (loop_module, "_FIRST_WAIT_S")]:  # fmt: skip
        monkeypatch.setattr(module, name, 0.001)


async def drive(steps: list[tuple[Any, ...]]) -> None:
    trial = Trial()
    before = asyncio.all_tasks()
    running = asyncio.create_task(trial.loop.run())
    for step in steps:
        await trial.step(*step)
    trial.loop.stop()
    async with asyncio.timeout(20):
        status = await running
    await asyncio.sleep(0)

    assert asyncio.all_tasks() == before
    assert status in ((0, 1) if trial.broken else (0,))
    assert trial.queue.held == set()
    # Each run has been closed, and no job ran twice at once.
    assert Counter(trial.work.begun) == Counter(trial.work.closed)
    for job_id, runs in Counter(trial.work.begun).items():
        # A run ends with one result, unless the platform stopped the job or the delivery failed for good.
        unheard = 0 if job_id not in trial.told and not trial.refused[job_id] else runs
        assert runs - unheard <= trial.results[job_id] <= runs


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEPS, max_size=30))
def test_any_order_of_events_leaves_no_job_without_an_end(steps: list[tuple[Any, ...]]) -> None:
    asyncio.run(drive(steps))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["openai_route", "openai_input", "messages", "prompt", "sampling_params", "stream", "model", "route", "x"]
ROUTES = st.sampled_from(["/v1/models", "/v1/chat/completions", "/v1/../x", "//a/b", "@host/", "/v1?x=y"])
INPUTS: st.SearchStrategy[Any] = JSON | st.dictionaries(
    st.sampled_from(FIELDS), JSON | ROUTES | st.just({}) | st.just([{}]), max_size=4
)
APP_KINDS = st.sampled_from(["json", "stream", "refusal", "broken", "empty"])


def app_of(kind: str) -> ScriptedApp:
    match kind:
        case "stream":
            return ScriptedApp(body=chat_chunks("a", "漢"), content_type="text/event-stream")
        case "refusal":
            return ScriptedApp(body=[b'{"error": {"message": "no", "type": "x", "code": 400}}'], status=400)
        case "broken":
            return ScriptedApp(body=[b'{"a":'], fails=True)
        case "empty":
            return ScriptedApp(body=[])
        case _:
            return ScriptedApp(body=[b'{"a": 1}'])


@settings(max_examples=5000, deadline=None)
@given(INPUTS, APP_KINDS, st.booleans())
def test_whatever_the_input_a_job_ends_with_an_answer_or_a_parseable_error(value: Any, kind: str, has_id: bool) -> None:
    job = {"id": "1", "input": value} if has_id else {"input": value}

    async def outputs() -> list[Any]:
        async with asyncio.timeout(10):
            return [output async for output in jobs.run(job, app_of(kind))]

    said = asyncio.run(outputs())

    assert said
    assert not math.isnan(len(json.dumps(said)))
    if isinstance(said[-1], dict) and "error" in said[-1]:
        document = json.loads(said[-1]["error"])
        assert document["error"]["message"]
        assert isinstance(document["status"], int)
        assert isinstance(document["retryable"], bool)
