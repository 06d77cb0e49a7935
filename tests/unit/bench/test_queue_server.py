"""The queue that the bench plays: a real client of the worker takes its jobs, and what it posts is read as a stream."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvloop

from bench.clients import RequestTrace
from bench.metrics import summarize
from bench.queue_server import QueueServer
from bench.scenarios import Scenario
from engine.errors import EngineError
from engine.queue.delivery import JobDelivery
from engine.queue.protocol import PostKind
from engine.queue.runpod_client import RunPodClient

pytestmark = pytest.mark.anyio
FOUR = Scenario(clients=3, tokens=4)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    """Run the tests on uvloop, as the bench does."""
    return "asyncio", {"loop_factory": uvloop.new_event_loop}


@pytest.fixture
async def queue() -> AsyncIterator[QueueServer]:
    async with QueueServer() as server:
        yield server


@pytest.fixture
async def client(queue: QueueServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunPodClient]:
    """A worker's client, which finds the queue by the variables that a worker gets."""
    from runpod.serverless.modules import rp_http, rp_job

    variables = queue.environment
    monkeypatch.setenv("SSL_CERT_FILE", variables["SSL_CERT_FILE"])
    worker = variables["RUNPOD_POD_ID"]
    monkeypatch.setattr(rp_job, "JOB_GET_URL", variables["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", worker))
    for name, url in (("JOB_STREAM_URL", "POST_STREAM"), ("JOB_DONE_URL", "POST_OUTPUT")):
        monkeypatch.setattr(rp_http, name, variables[f"RUNPOD_WEBHOOK_{url}"].replace("$RUNPOD_POD_ID", worker))
    async with RunPodClient() as result:
        # aiohttp has read what it trusts when it was imported.
        result._connections._take_connector._ssl = ssl.create_default_context(cafile=variables["SSL_CERT_FILE"])
        yield result


def events(tokens: int) -> list[str]:
    """Return the events of a stream with one word for each token."""
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"content": "word "}}]} for _ in range(tokens)]
    chunks[-1]["choices"][0]["finish_reason"] = "length"
    chunks.append({"choices": [], "usage": {"completion_tokens": tokens}})
    return [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]


async def work(client: RunPodClient, tokens: int = 4, error: EngineError | None = None) -> None:
    """Answer each job with an output for each event, or with an error."""

    async def answer(job: dict[str, Any]) -> None:
        delivery = JobDelivery(client.post, job["id"], time.monotonic() + 60)
        for event in events(tokens) if error is None else ():
            await delivery.stream(event)
        await delivery.finish(error)

    async with asyncio.TaskGroup() as group:
        while True:
            for job in await client.take(8):
                assert job["input"] == {"openai_route": "/v1/chat/completions"}
                group.create_task(answer(job))


async def closed_loop(
    queue: QueueServer, client: RunPodClient, clients: int = 1, seconds: float = 0.0, **answers: Any
) -> list[RequestTrace]:
    """Return what clients get while a worker answers."""
    working = asyncio.create_task(work(client, **answers))
    asking = asyncio.create_task(queue.closed_loop({"openai_route": "/v1/chat/completions"}, clients, seconds))
    await asyncio.wait({working, asking}, return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        working.result()
    working.cancel()
    await asyncio.wait({working})
    async with asyncio.timeout(10):
        while queue._polls:  # noqa: ASYNC110 (its last take, whose connection is closed now)
            await asyncio.sleep(0.01)
    return await asking


async def test_each_client_gets_complete_streams_one_after_another(queue: QueueServer, client: RunPodClient) -> None:
    traces = await closed_loop(queue, client, clients=3, seconds=0.2)

    measured = summarize(traces, FOUR)

    assert measured.errors == {}
    assert len(traces) >= 6
    assert measured.metrics["tokens_per_s"] == pytest.approx(4 * (measured.metrics["requests_per_s"] or 0))
    assert queue.posts == len(traces) * len(events(4))


async def test_a_platform_far_away_gets_outputs_no_faster_than_it_acknowledges_them(
    queue: QueueServer, client: RunPodClient
) -> None:
    queue.latency_s = 0.05
    (trace,) = await closed_loop(queue, client)

    gaps_s = [later - earlier for (earlier, _), (later, _) in zip(trace.received, trace.received[1:], strict=False)]
    # The event loop's timers have a resolution of 1 ms.
    assert min(gaps_s) > 0.045
    assert trace.received[0][0] - trace.due_s > 0.045


async def test_a_failed_job_and_a_short_answer_are_errors(queue: QueueServer, client: RunPodClient) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"error": EngineError("no room")}, "no room"),
        ({"tokens": 3}, "3 tokens instead of 4"),
    ]
    for arguments, why in cases:
        (error,) = summarize(await closed_loop(queue, client, **arguments), FOUR).errors
        assert why in error


async def test_a_post_for_an_unknown_job_is_acknowledged(queue: QueueServer, client: RunPodClient) -> None:
    """As after a retry: the first delivery has ended the job."""
    await client.post(PostKind.RESULT, "nobody's", b"{}")
    assert queue.posts == 0
