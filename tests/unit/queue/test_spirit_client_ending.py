"""Spirit: clients that leave, time limits, an unhealthy agent, the worker's end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.queue.spirit_agent import SpiritAgent
from tests.unit.queue.spirit_site import SpiritSite, spirit_site
from tests.unit.queue.test_spirit_client import ask, events

pytestmark = pytest.mark.anyio
Monkey = pytest.MonkeyPatch


@asynccontextmanager
async def streaming(site: SpiritSite) -> AsyncIterator[AsyncIterator[str]]:
    """Begin a stream whose app waits after the first word; yield the lines."""
    site.engine.go = asyncio.Semaphore(1)
    async with site.stream("one two three") as response:
        lines = response.aiter_lines()
        assert await anext(lines) == 'data: "one"'
        yield lines


async def rest(lines: AsyncIterator[str]) -> list[Any]:
    """Return the data of the events that are left."""
    return events("".join([f"{line}\n\n" async for line in lines if line]))


# A client that leaves


@pytest.mark.parametrize("answer_early", [False, True])
async def test_a_client_that_leaves_ends_the_apps_request_and_the_task(answer_early: bool, monkeypatch: Monkey) -> None:
    """Whether the agent closes the connection of the answer or answers before its end; there is no second answer."""
    async with spirit_site(monkeypatch, answerEarly=answer_early) as site:
        async with streaming(site):
            await asyncio.sleep(0.4)
        await asyncio.wait_for(site.engine.disconnected.wait(), 5)
        (task,) = await site.ended()
        await ask_open(site)
    assert (task["status"], task["answers"]) == ("failed", [200])


async def ask_open(site: SpiritSite) -> None:
    """Send another request: the worker still serves."""
    site.engine.go = asyncio.Semaphore(100)
    await ask(site, "stream")


async def test_a_client_that_leaves_before_the_first_event_is_noticed(monkeypatch: Monkey) -> None:
    """As while its prompt is computed: the answer begins with the app's, not with its first event."""
    async with spirit_site(monkeypatch) as site:
        site.engine.go = asyncio.Semaphore(0)
        async with site.stream("one two"):
            await asyncio.sleep(0.3)
        await asyncio.wait_for(site.engine.disconnected.wait(), 5)
        (task,) = await site.ended()
    assert task["answers"] == [200]


async def test_a_stream_that_is_cut_as_it_begins_is_answered_with_an_error(monkeypatch: Monkey) -> None:
    """The client may be there and have nothing: it must not wait for the platform's timeout."""
    async with spirit_site(monkeypatch) as site:
        site.engine.go = asyncio.Semaphore(1)
        await site.faults({"kind": "drop", "route": "request-proxy", "times": 1})
        response = await site.proxied("one two", stream=True)
        assert site.engine.disconnected.is_set()
        (task,) = await site.ended()
        await ask_open(site)
    assert (response.status_code, response.json()["retryable"]) == (500, True)
    assert task["answers"] == [500]


# Time limits


async def test_a_stream_ends_in_order_before_the_platform_cuts_it_off(monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch, request_timeout_s=1.0) as site, streaming(site) as lines:
        error, done = await rest(lines)
        (task,) = await site.ended()
    assert (error["error"]["type"], error["status"], done) == ("TimeoutError", 504, "[DONE]")
    assert (task["status"], task["answers"]) == ("failed", [200])
    assert site.engine.disconnected.is_set()


@pytest.mark.parametrize("kind", ["proxied", "handled"])
async def test_a_request_that_takes_too_long_is_answered_while_its_client_waits(kind: str, monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch, request_timeout_s=0.5) as site:
        site.engine.go = asyncio.Semaphore(0)
        response = await (site.proxied("a") if kind == "proxied" else site.handled("a"))
        (task,) = await site.ended()
    assert response.status_code == (504 if kind == "proxied" else 500)
    assert "has run for 0.5 s" in response.text
    assert task["answers"] == [504]


# The worker's end


async def test_a_running_stream_completes_after_the_worker_was_asked_to_stop(monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch) as site, streaming(site) as lines:
        site.loop.stop()
        await asyncio.sleep(0.3)
        site.engine.go.release()
        site.engine.go.release()
        assert await rest(lines) == ["two", "three", "[DONE]"]
        assert await asyncio.wait_for(site.running, 10) == 0


async def test_what_does_not_end_in_time_is_answered(monkeypatch: Monkey) -> None:
    """A stream by an event and its end, others by status 503; the tasks are acknowledged."""
    async with spirit_site(monkeypatch, drain_s=0.2) as site, streaming(site) as lines:
        others = [asyncio.create_task(request) for request in (site.proxied("a"), site.handled("a"))]
        while len(site.engine.requests) < 3:  # noqa: ASYNC110 (the app's)
            await asyncio.sleep(0.01)
        site.loop.stop()
        error, done = await rest(lines)
        proxied, handled = await asyncio.gather(*others)
        tasks = await site.ended(3)
    assert (error["status"], error["retryable"], done) == (503, True, "[DONE]")
    assert (proxied.status_code, proxied.json()["status"]) == (503, 503)
    assert "try again" in handled.json()["error"]
    assert {task["status"] for task in tasks} == {"failed"}


async def test_a_dead_engines_tasks_are_answered_and_the_worker_ends_with_1(monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch, exit_status=1) as site, streaming(site) as lines:
        other = asyncio.create_task(site.proxied("a"))
        while len(site.engine.requests) < 2:  # noqa: ASYNC110 (the app's)
            await asyncio.sleep(0.01)
        site.engine.failed = True
        error, done = await rest(lines)
        assert (await other).status_code == 503
        await site.ended(2)
    assert (error["status"], done) == (503, "[DONE]")


async def test_a_task_that_comes_as_the_worker_ends_is_answered(monkeypatch: Monkey) -> None:
    """Nothing in Spirit's protocol gives it back."""
    stock = SpiritAgent.take

    async def late(agent: SpiritAgent) -> tuple[dict[str, Any] | None, bool]:
        taken = await stock(agent)
        if taken[0] is not None:
            site.loop.stop()
            await asyncio.sleep(0.5)
        return taken

    monkeypatch.setattr(SpiritAgent, "take", late)
    async with spirit_site(monkeypatch, drain_s=0.0) as site:
        site.late.append(asyncio.create_task(site.proxied("a")))
        assert await asyncio.wait_for(site.running, 10) == 0
    assert [response.status_code for response in site.late_responses] == [503]


# An unhealthy agent


async def test_an_unhealthy_agent_ends_an_idle_worker_with_1(monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch, exit_status=1) as site:
        await site.faults({"kind": "unhealthy", "route": "request"})
        await asyncio.wait_for(asyncio.shield(site.running), 10)


async def test_a_task_that_comes_with_the_bad_news_is_answered(monkeypatch: Monkey) -> None:
    stock = SpiritAgent.take

    async def unhealthy(agent: SpiritAgent) -> tuple[dict[str, Any] | None, bool]:
        document, _ = await stock(agent)
        return document, document is None

    monkeypatch.setattr(SpiritAgent, "take", unhealthy)
    async with spirit_site(monkeypatch) as site:
        await ask(site, "answer")


async def test_an_unhealthy_agent_is_ignored_while_a_task_runs(monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch, exit_status=1) as site, streaming(site) as lines:
        await site.faults({"kind": "unhealthy", "route": "request"})
        await asyncio.sleep(0.8)
        site.engine.go.release()
        site.engine.go.release()
        assert await rest(lines) == ["two", "three", "[DONE]"]
        await site.ended()
        await asyncio.wait_for(asyncio.shield(site.running), 10)


async def test_many_streams_run_at_once(monkeypatch: Monkey) -> None:
    """The SDK's own session stops at 100 connections."""
    async with spirit_site(monkeypatch) as site:
        site.engine.go = asyncio.Semaphore(0)
        asking = [asyncio.create_task(site.proxied(f"{number} b", stream=True)) for number in range(150)]
        async with asyncio.timeout(30):
            while len(site.engine.requests) < 150:  # noqa: ASYNC110 (the app's)
                await asyncio.sleep(0.05)
        for _ in range(300):
            site.engine.go.release()
        responses = await asyncio.wait_for(asyncio.gather(*asking), 30)
    texts = [events(response.text) for response in responses]
    assert texts == [[str(number), "b", "[DONE]"] for number in range(150)]
