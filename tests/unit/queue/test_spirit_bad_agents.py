"""Spirit's client with agents that do what the emulator's does not: what they drop or keep ends no worker."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web

from engine.jobs.proxied import AnswerStart
from engine.queue import spirit_answer
from engine.queue.spirit_agent import SpiritAgent
from engine.queue.spirit_answer import ProxiedDelivery
from engine.queue.spirit_client import SpiritClient
from engine.queue.spirit_delivery import HandlerDelivery
from engine.queue.spirit_sdk import Concurrency
from engine.queue.spirit_task import read_task

pytestmark = pytest.mark.anyio
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Agent:
    """An agent whose calls are counted by kind, and answered as a test says; others with 200."""

    def __init__(self, **answers: Answer) -> None:
        self.calls: Counter[str] = Counter()
        self._answers = answers
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        kind = request.path.split("/")[3]
        self.calls[kind] += 1
        answer = self._answers.get(kind.replace("-", "_"))
        if answer is not None:
            return await answer(request)
        await request.read()
        return web.Response()


@asynccontextmanager
async def running(agent: Agent) -> AsyncIterator[Agent]:
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", agent.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    agent.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield agent
    finally:
        await runner.cleanup()


async def drop(request: web.Request) -> web.StreamResponse:
    await request.read()
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def never(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


def document(**headers: str) -> dict[str, Any]:
    """Return a task as the agent gives it out."""
    now_ms = str(int(time.time() * 1000))
    required = {"Ease-Request-Id": "t1", "Ease-Enqueue-At": now_ms, "Ease-Create-At": now_ms, "Ease-Mode": "sync"}
    body = base64.b64encode(json.dumps({"input": {"prompt": "a"}}).encode()).decode()
    return {"headers": {**required, "Ease-Time-To-Live": "600000", **headers}, "body": body}


@pytest.mark.parametrize(
    "url", ["http://a%3Ab:p@127.0.0.1:1/", "http://日:p@127.0.0.1:1/", "ftp://127.0.0.1/", "mailto:a@b", "http://"]
)
async def test_a_webhook_that_is_no_url_costs_only_the_webhook(url: str) -> None:
    """It is the client's: an error of its parsing must not end the worker."""
    async with running(Agent()) as agent, SpiritAgent(agent.url, "X-Agent-Health") as connections:
        delivery = HandlerDelivery(
            connections, read_task(document(**{"Ease-Webhook": url})), time.monotonic() + 60, 170
        )
        await delivery.stream("answer")
        outcome = await delivery.finish()
    assert outcome == "completed"
    assert (agent.calls["request-result"], agent.calls["request-ack"]) == (1, 1)


@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("answer", [drop, never])
async def test_an_answer_that_an_agent_drops_or_keeps_does_not_keep_the_jobs_slot(
    answer: Answer, content_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the task acknowledged: another worker may answer it."""
    monkeypatch.setattr(spirit_answer, "ANSWER_TIMEOUT_S", 0.5)
    async with running(Agent(request_proxy=answer)) as agent, SpiritAgent(agent.url, "X-Agent-Health") as connections:
        delivery = ProxiedDelivery(connections, read_task(document()), time.monotonic() + 600, 170, lambda _: None)
        await delivery.stream(AnswerStart(200, content_type))
        await delivery.stream(b"data: [DONE]\n\n")
        outcome = await asyncio.wait_for(delivery.finish(), 20)
    assert outcome == "undelivered"
    assert agent.calls["request-proxy"] >= 1
    assert agent.calls["request-ack"] == 0


async def test_an_agent_that_repeats_a_running_task_is_not_asked_without_a_pause(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def repeat(_: web.Request) -> web.StreamResponse:
        return web.json_response(document())

    caplog.set_level(logging.WARNING)
    async with running(Agent(request=repeat)) as agent:
        monkeypatch.setattr("spirit_gpu.settings.SETTINGS.agent_url", lambda: agent.url)
        async with SpiritClient(cast("Concurrency", SimpleNamespace(current_jobs=set()))) as queue:
            (job,) = await queue.take(1)
            queue.add_in_progress(job["id"])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(queue.take(1), 1.0)
            queue.remove_in_progress(job["id"])
    assert 2 <= agent.calls["request"] < 40
    assert caplog.text.count("given out again while it runs") == 1
