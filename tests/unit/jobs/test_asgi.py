"""In-process ASGI calls: the request, the response, and what an early disconnect does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from fastapi import APIRouter, FastAPI

from engine.backend import app
from engine.backend.app import Message, Receive, Send
from engine.errors import EngineError
from engine.jobs import asgi
from engine.jobs.request import Request
from tests.scripted import ScriptedApp

pytestmark = pytest.mark.anyio
POST = Request("POST", "/v1/chat/completions", "beta=true", b'{"a":1}')


async def test_the_app_receives_the_request_and_the_caller_the_response() -> None:
    app = ScriptedApp(body=[b'{"b":', b"2}"], status=201)

    async with asgi.stream(app, POST, "job-1") as response:
        body = await response.body()

    ((scope, sent),) = app.requests
    assert (response.status, response.content_type, body) == (201, "application/json", b'{"b":2}')
    assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/v1/chat/completions", b"beta=true")
    assert dict(scope["headers"])[b"x-request-id"] == b"job-1"
    assert sent == POST.body
    assert app.disconnects == 0


async def test_a_large_body_arrives_in_pieces_and_complete() -> None:
    pieces: list[int] = []
    body = bytes(range(256)) * 10_000

    async def app(_: Message, receive: Receive, send: Send) -> None:
        received = b""
        message: Message = {}
        while message.get("more_body", True):
            message = await receive()
            received += message["body"]
            pieces.append(len(message["body"]))
        await send({"type": "http.response.start", "status": 200 if received == body else 400, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with asgi.stream(app, Request("POST", "/v1/audio/transcriptions", body=body)) as response:
        assert response.status == 200

    assert len(pieces) > 1
    assert max(pieces) <= 2**20


async def test_a_job_id_that_is_not_a_valid_header_is_not_sent() -> None:
    app = ScriptedApp()

    async with asgi.stream(app, POST, "job\r\nhost: elsewhere"):
        pass

    assert b"x-request-id" not in dict(app.requests[0][0]["headers"])


async def test_chunks_that_arrive_while_the_caller_is_busy_are_joined() -> None:
    app = ScriptedApp(body=[b"a", b"b", b"c", b"d"])

    async with asgi.stream(app, POST) as response:
        assert await response.wait_complete(10)
        chunks = [chunk async for chunk in response.chunks()]

    assert chunks == [b"abcd"]


async def test_leaving_the_block_early_disconnects_and_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    app = ScriptedApp(body=[b"x"] * 1000, pause_s=0.01)

    async with asgi.stream(app, POST) as response:
        async for _ in response.chunks():
            break

    assert app.disconnects == 1
    assert asyncio.all_tasks() == before


async def test_cancelling_the_caller_disconnects_and_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    app = ScriptedApp(body=[b"x"] * 1000, pause_s=0.01)

    async def caller() -> None:
        async with asgi.stream(app, POST) as response:
            await response.body()

    task = asyncio.ensure_future(caller())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert app.disconnects == 1
    assert asyncio.all_tasks() == before


async def test_an_app_that_ignores_the_disconnect_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "DISCONNECT_GRACE_S", 0.01)
    cancelled = asyncio.Event()

    async def ignore_disconnect(scope: Message, receive: Receive, send: Send) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with asgi.stream(ignore_disconnect, POST):
        pass

    assert cancelled.is_set()


async def test_messages_after_a_disconnect_are_dropped_without_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error would leave vLLM's generators open, and the request running in the engine."""
    sent = []

    async def send_after_disconnect(scope: Message, receive: Receive, send: Send) -> None:
        del scope
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await receive())["type"] == "http.disconnect"
        for number in range(3):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent.append(number)

    async with asgi.stream(send_after_disconnect, POST):
        pass

    assert sent == [0, 1, 2]
    assert caplog.messages == []


async def test_an_app_that_raises_before_its_response_is_an_engine_error(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("out of cheese")

    with pytest.raises(EngineError):
        async with asgi.stream(broken, POST):
            pass

    assert "out of cheese" in caplog.text


async def test_an_app_that_raises_during_its_response_is_an_error_after_its_chunks() -> None:
    app = ScriptedApp(body=[b"half"], fails=True)

    async def consume() -> None:
        async with asgi.stream(app, POST) as response:
            chunks = response.chunks()
            assert await anext(chunks) == b"half"
            await anext(chunks)

    with pytest.raises(EngineError):
        await consume()


def _app_with_many_lifespans(begun: list[int], ended: list[int]) -> FastAPI:
    """Return an app whose routers have their own lifespans, as vLLM's have."""

    def lifespan(number: int) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
        @asynccontextmanager
        async def context(_app: FastAPI) -> AsyncIterator[None]:
            begun.append(number)
            try:
                yield
            finally:
                await asyncio.sleep(0)
                ended.append(number)

        return context

    app = FastAPI(lifespan=lifespan(0))
    for number in range(1, 6):
        app.include_router(APIRouter(lifespan=lifespan(number)))
    return app


def test_lifespans_end_with_the_event_loop_in_reverse_order() -> None:
    begun: list[int] = []
    ended: list[int] = []
    errors: list[str] = []

    async def run() -> asyncio.Task[None]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["message"]))
        return await app.run_lifespan(_app_with_many_lifespans(begun, ended))

    asyncio.run(run())

    assert sorted(begun) == [0, 1, 2, 3, 4, 5]
    assert ended == begun[::-1]
    assert errors == []


async def test_a_lifespan_that_fails_to_start_is_an_error() -> None:
    @asynccontextmanager
    async def broken(_app: FastAPI) -> AsyncIterator[None]:
        raise ValueError("no start")
        yield

    with pytest.raises(ValueError, match="no start"):
        await app.run_lifespan(FastAPI(lifespan=broken))
