"""Short requests are rendered inline, long ones in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.backend.app import Message, Receive, Send
from engine.backend.inline_executor import SHORT, SHORT_BYTES, InlineExecutor
from engine.jobs import asgi
from engine.jobs.request import Request

pytestmark = pytest.mark.anyio


@pytest.fixture
def executor() -> Iterator[InlineExecutor]:
    executor = InlineExecutor(ThreadPoolExecutor(1))
    yield executor
    executor.shutdown()


class App:
    """Renders each request with the executor, as vLLM does, and records in which thread."""

    def __init__(self, executor: InlineExecutor) -> None:
        self.threads: dict[str, int] = {}
        self._executor = executor

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        del receive
        loop = asyncio.get_running_loop()
        self.threads[scope["path"]] = await loop.run_in_executor(self._executor, threading.get_ident)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})


async def send(app: App, path: str, body: bytes | None) -> None:
    """Send a request to the app and read its response."""
    async with asgi.stream(app, Request("POST", path, body=body)) as response:
        await response.body()


async def test_only_short_requests_are_rendered_inline(executor: InlineExecutor) -> None:
    app = App(executor)
    bodies = {"short": bytes(SHORT_BYTES), "long": bytes(SHORT_BYTES + 1), "short again": b"", "none": None}

    # In one task, so that the length of one request could affect the next one.
    for path, body in bodies.items():
        await send(app, path, body)

    own = threading.get_ident()
    assert [path for path, thread in app.threads.items() if thread == own] == ["short", "short again", "none"]
    assert app.threads.keys() == bodies.keys()


async def test_concurrent_requests_do_not_affect_each_other(executor: InlineExecutor) -> None:
    app = App(executor)
    bodies = {f"{number}": bytes(1 if number % 2 else 999_999) for number in range(20)}

    await asyncio.gather(*(send(app, path, body) for path, body in bodies.items()))

    own = threading.get_ident()
    assert {path for path, thread in app.threads.items() if thread == own} == {str(n) for n in range(1, 20, 2)}


async def test_an_inline_error_is_raised_by_the_future(executor: InlineExecutor) -> None:
    def fail() -> None:
        raise ValueError("no such template")

    SHORT.set(True)
    future = executor.submit(fail)

    with pytest.raises(ValueError, match="no such template"):
        future.result()


async def test_work_outside_of_a_request_runs_in_a_thread(executor: InlineExecutor) -> None:
    future = executor.submit(threading.get_ident)
    assert await asyncio.wrap_future(future) != threading.get_ident()
