"""Takes: whatever stands in one, each job in it that can be read is run, and one that cannot be ends with an error."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack
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
from tests.unit.queue.test_admission import Load

GOOD = b'{"id":"good","input":{"prompt":"hi"}}'
LIMIT = 256


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
def test_what_stands_in_a_take(body: bytes, found: list[Any]) -> None:
    got = found_in(body)

    for one in got:
        if isinstance(one, dict) and isinstance(one["input"], UnreadableInput):
            del one["input"]
    assert got == found


def test_a_job_that_is_too_deep_says_so_and_what_is_no_json_says_where() -> None:
    deep, broken = found_in(b'[{"id":"1","input":%b},{"id":"2","input":01}]' % nested(3000))

    assert deep["input"] == "the job is nested too deeply"
    assert broken["input"].startswith("the job is not JSON in UTF-8")


class Site:
    """A platform on this machine that gives the next of its `takes` to a worker, over HTTP, through the SDK."""

    def __init__(self) -> None:
        self.takes: asyncio.Queue[bytes] = asyncio.Queue()
        self.results: dict[str, dict[str, Any]] = {}
        self.has_result = asyncio.Event()
        self.stack = AsyncExitStack()

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/{kind:job-take|job-take-batch}/worker", self.take)
        app.router.add_post("/{kind:output|result}/{job}", self.post)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        self.stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"

        from runpod.serverless.modules import rp_job

        self.stack.callback(setattr, rp_job, "JOB_GET_URL", rp_job.JOB_GET_URL)
        rp_job.JOB_GET_URL = f"{url}/job-take/worker?x=1"
        platform = await self.stack.enter_async_context(RunPodClient())
        platform._urls = {kind: f"{url}/{kind.value}/$ID?x=1" for kind in PostKind}
        engine = ScriptedApp(body=[b'{"answer": true}'])
        self.loop = JobLoop(platform, lambda job: pipeline.run(job, engine), Admission(Load(), LIMIT, 10**9))
        self.running = asyncio.create_task(self.loop.run())

    async def end(self) -> None:
        self.loop.stop()
        assert await self.running == 0
        await self.stack.aclose()

    async def take(self, _: web.Request) -> web.Response:
        return web.Response(body=await self.takes.get(), content_type="application/json")

    async def post(self, request: web.Request) -> web.Response:
        if request.match_info["kind"] == "result":
            self.results[request.match_info["job"]] = json.loads(await request.read())
            self.has_result.set()
        return web.Response()

    async def results_of(self, body: bytes, job_ids: set[str]) -> dict[str, dict[str, Any]]:
        """The results of these jobs of a take."""
        self.results.clear()
        self.takes.put_nowait(body)
        async with asyncio.timeout(10):
            while not job_ids <= self.results.keys():
                self.has_result.clear()
                await self.has_result.wait()
        return self.results


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[asyncio.Runner, Site]]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, pytest.MonkeyPatch.context() as patch:
        # Takes that bring nothing follow one another without a pause.
        patch.setattr(backoff, "_MAX_ERROR_WAIT_S", 0.0)
        patch.setattr(backoff, "_MAX_IDLE_WAIT_S", 0.0)
        site = Site()
        runner.run(site.start())
        yield runner, site
        runner.run(site.end())


# No example has the ids of another: what is given out again while it runs is not run twice.
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
    lambda job_id, said: (job_id, b'{"id":%b,"input":{"prompt":%b}}' % (enc(job_id), enc(said))),
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


def enc(text: str) -> bytes:
    return json.dumps(text).encode()


def body_of(shape: str, entries: list[tuple[str | None, bytes]]) -> tuple[bytes, list[tuple[str | None, bytes]]]:
    """The whole answer to a take, and those of the entries that are complete in it."""
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
def test_whatever_stands_in_a_take_each_well_formed_job_in_it_ends_with_its_answer(
    site: tuple[asyncio.Runner, Site], shape: str, entries: list[tuple[str | None, bytes]]
) -> None:
    runner, platform = site
    example = str(next(EXAMPLE))
    body, complete = body_of(shape, entries)
    body = body.replace(b"EXAMPLE", example.encode())
    ids = {job_id.replace("EXAMPLE", example) for job_id, _ in complete if job_id is not None}

    results = runner.run(platform.results_of(body, ids))

    assert {job_id: results[job_id] for job_id in ids} == {job_id: {"output": [{"answer": True}]} for job_id in ids}


@pytest.mark.parametrize("deep", [1100, 3000, 200_000])
def test_one_job_that_is_nested_too_deeply_ends_with_an_error_and_the_others_with_their_answer(
    site: tuple[asyncio.Runner, Site], deep: int
) -> None:
    runner, platform = site
    others = [b'{"id":"other-%d","input":{"prompt":"hi"}}' % number for number in range(5)]
    evil = b'{"id":"evil","input":{"prompt":"x","sampling_params":{"a":%b}}}' % nested(deep)
    body = b"[%b]" % b",".join([*others[:3], evil, *others[3:]])

    results = runner.run(platform.results_of(body, {"evil", *(f"other-{number}" for number in range(5))}))

    assert [results[f"other-{number}"] for number in range(5)] == [{"output": [{"answer": True}]}] * 5
    error = json.loads(results["evil"]["error"])
    assert (error["status"], error["retryable"]) == (400, False)
    assert "nested too deeply" in error["error"]["message"]
