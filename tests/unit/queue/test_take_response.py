"""Responses to a take: each job that can be read runs; one that cannot be read fails with an error if it has an id."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
import uvloop
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.jobs import pipeline
from engine.jobs.inputs import UnreadableInput
from engine.queue import backoff
from engine.queue.admission import Admission
from engine.queue.job_loop import JobLoop
from engine.queue.protocol import PostKind
from engine.queue.runpod_client import RunPodClient
from engine.queue.take_response import jobs_in
from tests.scripted import ScriptedApp
from tests.unit.queue.fakes import FakeLoad

GOOD = b'{"id":"good","input":{"prompt":"hi"}}'
LIMIT = 256
# When a job counts as lost. Turns of the event loop are counted, this far apart, not seconds: a busy machine may leave
# this process without a processor for ten of them.
LOST_AFTER_TURNS = 1000
TURN_S = 0.01


def found_in(body: bytes) -> list[Any]:
    return asyncio.run(jobs_in(body))


def nested(depth: int, closes: bool = True) -> bytes:
    return b"[" * depth + b"]" * depth * closes


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (GOOD, [json.loads(GOOD)]),
        (b"[%b]" % GOOD, [json.loads(GOOD)]),
        (b"[]", []),
        (b"null", []),
        (b"", []),
        (b"[1,null]", [1, None]),
        (b'["{]\\"", %b, {"id":"late","input":' % GOOD, [json.loads(GOOD)]),
        (b'[%b,{"id":"cut","input":{"a":"{' % GOOD, [json.loads(GOOD)]),
        (b'[{"input":"id","id" : "bad","x":01},%b' % GOOD, [{"id": "bad"}, json.loads(GOOD)]),
        (b'[{"id":"\\u0062ad","input":{"id":"x"},"x":"\xff"},%b]' % GOOD, [{"id": "bad"}, json.loads(GOOD)]),
        (b'[%b,{"input":{"id":"x"},"y":{]}' % GOOD, [json.loads(GOOD), {"id": None}]),
        (b'[{"id":7,"input":%b},%b]' % (nested(3000), GOOD), [{"id": 7}, json.loads(GOOD)]),
        (b"[%b,%b]" % (nested(3000), GOOD), [json.loads(GOOD)]),
        (b'[{"id":"\xff"},%b,{"id":01}]' % GOOD, [None, json.loads(GOOD), None]),
        (b'[{"id":"half","input":"\\ud83d"},%b]' % GOOD, [{"id": "half", "input": "\ud83d"}, json.loads(GOOD)]),
    ],
)
def test_the_jobs_of_a_response_are_found_even_if_others_are_malformed(body: bytes, found: list[Any]) -> None:
    got = found_in(body)

    for one in got:
        if isinstance(one, dict) and isinstance(one["input"], UnreadableInput):
            del one["input"]
    assert got == found


def test_a_job_that_is_too_deep_or_not_json_has_an_input_that_says_so() -> None:
    deep, broken = found_in(b'[{"id":"1","input":%b},{"id":"2","input":01}]' % nested(3000))

    assert deep["input"] == "the job is nested too deeply"
    assert broken["input"].startswith("the job is not JSON in UTF-8")


class LocalPlatform:
    """A platform over HTTP, and a worker on it through the SDK. A take gets the next of `take_bodies`."""

    def __init__(self) -> None:
        self.take_bodies: asyncio.Queue[bytes] = asyncio.Queue()
        self.results: dict[str, dict[str, Any]] = {}
        self.has_result = asyncio.Event()
        self.stack = AsyncExitStack()

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/{kind:job-take|job-take-batch}/worker", self.take)
        app.router.add_get("/job-stop/worker", self.hold_stop_signals)
        app.router.add_post("/{kind:output|result}/{job}", self.post)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        self.stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"

        from runpod.serverless.modules import rp_job

        self.stack.callback(setattr, rp_job, "JOB_GET_URL", rp_job.JOB_GET_URL)
        rp_job.JOB_GET_URL = f"{url}/job-take/worker?x=1"
        client = await self.stack.enter_async_context(RunPodClient())
        client._urls = {kind: f"{url}/{kind.value}/$ID?x=1" for kind in PostKind}
        engine = ScriptedApp(body=[b'{"answer": true}'])
        self.loop = JobLoop(client, lambda job: pipeline.run(job, engine), Admission(FakeLoad(), LIMIT, 10**9))
        self.running = asyncio.create_task(self.loop.run())

    async def stop(self) -> None:
        self.loop.stop()
        assert await self.running == 0
        await self.stack.aclose()

    async def take(self, _: web.Request) -> web.Response:
        return web.Response(body=await self.take_bodies.get(), content_type="application/json")

    async def hold_stop_signals(self, _: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response(status=204)

    async def post(self, request: web.Request) -> web.Response:
        if request.match_info["kind"] == "result":
            self.results[request.match_info["job"]] = json.loads(await request.read())
            self.has_result.set()
        return web.Response()

    async def results_of(self, body: bytes, job_ids: set[str]) -> dict[str, dict[str, Any]]:
        """Answer a take with this body; return the results of its jobs."""
        self.results.clear()
        self.take_bodies.put_nowait(body)
        for _ in range(LOST_AFTER_TURNS):
            if job_ids <= self.results.keys():
                return self.results
            self.has_result.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(TURN_S):
                    await self.has_result.wait()
        raise AssertionError(f"no results of {', '.join(sorted(job_ids - self.results.keys()))}")


@pytest.fixture(scope="module")
def platform() -> Iterator[tuple[asyncio.Runner, LocalPlatform]]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, pytest.MonkeyPatch.context() as patch:
        # Takes that bring no job follow one another without a pause.
        patch.setattr(backoff, "_MAX_ERROR_WAIT_S", 0.0)
        patch.setattr(backoff, "_MAX_IDLE_WAIT_S", 0.0)
        platform = LocalPlatform()
        runner.run(platform.start())
        yield runner, platform
        runner.run(platform.stop())


# Each example has its own ids: a job that is redelivered while it runs does not run twice.
EXAMPLE = itertools.count()
IDS = st.sampled_from([f"job-EXAMPLE-{number}" for number in range(9)])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
TEXTS = JSON.map(lambda value: json.dumps(value).encode())
DEEP = st.builds(nested, st.sampled_from([90, 900, 980, 1100, 3000, 20_000]))
WELL_FORMED = st.builds(
    lambda job_id, said: (job_id, b'{"id":%b,"input":{"prompt":%b}}' % (quote(job_id), quote(said))),
    IDS,
    st.text(min_size=1),
)
ILL_FORMED = st.one_of(
    TEXTS,
    DEEP,
    st.builds(lambda value: b'{"id":%b,"input":{"prompt":"x"}}' % value, TEXTS),
    st.builds(lambda value: b'{"input":%b}' % value, TEXTS | DEEP),
    st.builds(lambda job_id, value: b'{"id":"bad-%b","input":%b}' % (job_id, value), IDS.map(str.encode), TEXTS | DEEP),
    st.sampled_from([b'{"id":"bad","input":01}', b'{"id":"bad","input":"\xff"}', b'{"id":"bad"}', b"", b"NaN", b"x"]),
)
ENTRIES = st.lists(WELL_FORMED | ILL_FORMED.map(lambda text: (None, text)), max_size=6)
SHAPES = st.sampled_from(["list", "list", "list", "one", "cut", "cut within a string"])


def quote(text: str) -> bytes:
    return json.dumps(text).encode()


def body_of(shape: str, entries: list[tuple[str | None, bytes]]) -> tuple[bytes, list[tuple[str | None, bytes]]]:
    """Return the response to a take, and the entries that are complete in it."""
    texts = b",".join(text for _, text in entries)
    match shape:
        case "one":
            return b",".join(text for _, text in entries[:1]), entries[:1]
        case "cut":
            return b"[" + texts, entries
        case "cut within a string":
            return b"[" + texts + b',{"id":"cut","input":{"prompt":"a \\"{', entries
        case _:
            return b"[%b]" % texts, entries


@pytest.mark.timeout(480)
@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "500")), deadline=None)
@given(SHAPES, ENTRIES)
def test_each_well_formed_job_of_any_response_completes(
    platform: tuple[asyncio.Runner, LocalPlatform], shape: str, entries: list[tuple[str | None, bytes]]
) -> None:
    runner, local = platform
    example = str(next(EXAMPLE))
    body, complete = body_of(shape, entries)
    body = body.replace(b"EXAMPLE", example.encode())
    ids = {job_id.replace("EXAMPLE", example) for job_id, _ in complete if job_id is not None}

    results = runner.run(local.results_of(body, ids))

    assert {job_id: results[job_id] for job_id in ids} == {job_id: {"output": [{"answer": True}]} for job_id in ids}


@pytest.mark.parametrize("deep", [1100, 3000, 200_000])
def test_a_job_that_is_nested_too_deeply_fails_and_the_others_complete(
    platform: tuple[asyncio.Runner, LocalPlatform], deep: int
) -> None:
    runner, local = platform
    others = [b'{"id":"other-%d","input":{"prompt":"hi"}}' % number for number in range(5)]
    evil = b'{"id":"evil","input":{"prompt":"x","sampling_params":{"a":%b}}}' % nested(deep)
    body = b"[%b]" % b",".join([*others[:3], evil, *others[3:]])

    results = runner.run(local.results_of(body, {"evil", *(f"other-{number}" for number in range(5))}))

    assert [results[f"other-{number}"] for number in range(5)] == [{"output": [{"answer": True}]}] * 5
    error = json.loads(results["evil"]["error"])
    assert (error["status"], error["retryable"]) == (400, False)
    assert "nested too deeply" in error["error"]["message"]
