"""The app that is served: what is refused, what reaches vLLM's app, and how a request ends. Over real HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import aiohttp
import httpx
import pytest
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.websockets import WebSocket
from uvicorn.server import ServerState

from engine.backend.app import App, Message, Receive, Send
from engine.backend.inline_executor import SHORT
from engine.backend.merging import MERGEABLE
from engine.cold_start import ColdStart
from engine.errors import WorkerShutdownError
from engine.jobs.http_server import Server, _Connection, server_config
from engine.run_clock import CLOCK
from engine.server.app import ServerApp
from engine.server.health_check import Health, HealthCheck
from engine.server.limiter import Limiter
from engine.telemetry.costs import Costs
from engine.telemetry.job_times import JobTimes, RequestStats
from tests.scripted import ScriptedApp, chat_chunks

pytestmark = pytest.mark.anyio
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@dataclass
class Served:
    """An app that is served, and a client of it."""

    url: str
    app: ServerApp
    health: HealthCheck
    client: httpx.AsyncClient


class Engine(ScriptedApp):
    """What is served; as `ScriptedApp`, it is its own app."""

    def pop_request_stats(self, job_id: str) -> list[RequestStats]:
        del job_id
        return [RequestStats(3, 4, 0.1, 0.2, 0.3)]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 (the test's timeout ends it)
        await asyncio.sleep(0.005)


@asynccontextmanager
async def serve(engine: Any, slots: int = 8, max_wait_s: float = 0.05, **options: Any) -> AsyncIterator[Served]:
    health = HealthCheck("/ping")
    limiter = Limiter(lambda running: max(slots - running, 0), asyncio.Event(), max_wait_s)
    app = ServerApp(engine, health, limiter, **options)
    server = Server(server_config(app, port=0, timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        try:
            yield Served(url, app, health, client)
        finally:
            server.should_exit = True
            await serving


async def test_a_response_has_the_requests_id_in_its_body() -> None:
    engine = Engine()

    async with serve(engine) as site:
        await site.client.post("/v1/responses", json={"input": "hi"}, headers={"x-request-id": "mine-1"})

    ((_, sent),) = engine.requests
    assert json.loads(sent) == {"input": "hi", "request_id": "resp_mine-1"}


async def test_a_request_reaches_the_app_as_it_was_sent_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "engine")
    engine, cold_start = Engine(body=[b'{"b":', b"2}"]), ColdStart()
    body = json.dumps(CHAT).encode()

    async with serve(engine, cold_start=cold_start) as site:
        headers = {"content-type": "application/json", "x-request-id": "mine-1", "x-other": "y"}
        response = await site.client.post("/v1/chat/completions?beta=true", content=body, headers=headers)

    assert (response.status_code, response.json()) == (200, {"b": 2})
    ((scope, sent),) = engine.requests
    assert (sent, scope["query_string"]) == (body, b"beta=true")
    assert dict(scope["headers"])[b"x-request-id"] == b"mine-1"
    assert dict(scope["headers"])[b"x-other"] == b"y"
    started, ended = (json.loads(one.message) for one in caplog.records if one.name == "engine.jobs.job_log")
    assert started == {"job": "mine-1", "route": "/v1/chat/completions", "status": "started"}
    assert ended["status"] == "completed"
    assert (ended["tokens_in"], ended["tokens_out"], ended["batches"]) == (3, 4, 2)
    assert list(cold_start.document()["phases_s"]) == ["first_take", "first_output"]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("path", "unknown", "status"),
    [("/sleep", frozenset(), 403), ("/nowhere", frozenset({"/nowhere"}), 404), ("/", frozenset({"/"}), 404)],
)
async def test_a_route_that_is_not_open_is_refused_as_a_job_is(path: str, unknown: frozenset[str], status: int) -> None:
    engine = Engine(unknown_routes=unknown)

    async with serve(engine) as site:
        response = await site.client.post(path, json={})

    assert response.status_code == response.json()["status"] == status
    assert "job" not in response.json()["error"]["message"]
    assert engine.requests == []


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/completions/?a=b"])
async def test_a_slash_at_the_end_of_a_route_is_dropped_as_in_a_job(path: str) -> None:
    """A redirect, as vLLM sends, would lead to the address of the worker, which clients of a balancer do not reach."""
    engine = Engine()

    async with serve(engine) as site:
        response = await site.client.post(path, json={"prompt": "a"})

    ((scope, _),) = engine.requests
    assert response.status_code == 200
    assert (scope["path"], scope["raw_path"]) == ("/v1/completions", b"/v1/completions")


async def test_a_route_of_websockets_gets_vllms_own_answer_without_an_upgrade() -> None:
    async with serve(Engine(status=404)) as site:
        response = await site.client.get("/v1/realtime")

    assert response.status_code == 404


async def test_old_names_are_translated_and_other_json_is_untouched() -> None:
    engine = Engine()
    odd = b'{"messages" : [],\n "seed": NaN}'
    headers = {"content-type": "application/json; charset=utf-8"}

    async with serve(engine) as site:
        await site.client.post("/v1/chat/completions", json={**CHAT, "guided_json": {"type": "object"}})
        await site.client.post("/v1/chat/completions", content=odd, headers=headers)
        await site.client.post("/v1/chat/completions", content=b"{", headers=headers)
        refused = await site.client.post("/v1/embeddings", json={"input": "x", "guided_regex": "a"})

    (_, translated), *others = engine.requests
    assert json.loads(translated)["structured_outputs"] == {"json": {"type": "object"}}
    assert [body for _, body in others] == [odd, b"{"]
    assert (refused.status_code, refused.json()["retryable"]) == (400, False)


async def test_a_form_with_a_file_passes_through() -> None:
    file = b"\x00\xff" * 200_000

    class Listener(Engine):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            form = await Request(scope, receive).form()
            upload = form["file"]
            assert isinstance(upload, UploadFile)
            await Response(await upload.read(), headers={"x-name": str(upload.filename)})(scope, receive, send)
            await form.close()

    async with serve(Listener()) as site:
        response = await site.client.post("/v1/audio/transcriptions", files={"file": ("a.wav", file)})

    assert (response.status_code, response.headers["x-name"], response.content) == (200, "a.wav", file)


async def test_code_deep_inside_vllm_learns_whether_a_request_is_short_and_mergeable() -> None:
    seen: list[tuple[bool, bool]] = []

    class Looking(Engine):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            seen.append((SHORT.get(), MERGEABLE.get()))
            await super().__call__(scope, receive, send)

    async with serve(Looking()) as site:
        await site.client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        await site.client.post("/v1/chat/completions", json={**CHAT, "user": "x" * 5000})
        await site.client.post("/v1/chat/completions", json=CHAT)

    assert seen == [(True, True), (False, False), (True, False)]


async def test_a_full_engine_refuses_with_retry_after_but_routes_that_generate_nothing_are_served() -> None:
    engine = Engine(body=[b"{}", b"{}"], pause_s=0.3)

    async with serve(engine, slots=1) as site:
        first = asyncio.create_task(site.client.post("/v1/completions", json={"prompt": "a"}))
        await until(lambda: engine.requests)
        second = await site.client.post("/v1/completions", json={"prompt": "b"})
        models = await site.client.get("/v1/models")
        tokens = await site.client.post("/tokenize", json={"prompt": "b"})
        assert (await first).status_code == 200

    assert (second.status_code, second.headers["retry-after"]) == (429, "1")
    assert second.json()["error"]["code"] == 429
    assert (models.status_code, tokens.status_code) == (200, 200)


async def test_a_request_that_takes_too_long_gets_504_and_ends_in_the_engine() -> None:
    class Silent(Engine):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            del scope, send
            await receive()
            assert (await receive())["type"] == "http.disconnect"
            self.disconnected.set()

    engine = Silent()
    async with serve(engine, execution_timeout_s=0.1) as site:
        response = await site.client.post("/v1/completions", json={"prompt": "a"})

    assert engine.disconnected.is_set()
    assert (response.status_code, response.json()["error"]["type"]) == (504, "TimeoutError")


async def test_a_stream_that_takes_too_long_ends_with_an_error_event() -> None:
    engine = Engine(body=chat_chunks(*"abcdefghij"), content_type="text/event-stream", pause_s=0.1)

    async with serve(engine, execution_timeout_s=0.25) as site:
        response = await site.client.post("/v1/chat/completions", json={**CHAT, "stream": True})

    *_, error, done = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    assert json.loads(error)["error"]["code"] == 504
    assert done == "[DONE]"
    assert engine.disconnects == 1


async def test_a_client_that_does_not_read_cannot_keep_its_request_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers are full, so that not even the error at the end can be sent."""
    monkeypatch.setattr("engine.server.request.LAST_SEND_S", 0.1)
    engine = Engine(body=[b"x" * 2**20] * 1000, content_type="text/event-stream")

    async with serve(engine, execution_timeout_s=0.5) as site:
        with socket.create_connection((site.client.base_url.host, site.client.base_url.port or 0)) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
            await until(lambda: site.app.running)
            await asyncio.wait_for(until(lambda: not site.app.running), 10)

    assert engine.disconnects == 1


async def test_an_app_that_ignores_the_end_of_its_request_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.server.request.ABORT_GRACE_S", 0.1)

    class Deaf(Engine):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            del scope, receive, send
            await asyncio.Event().wait()

    async with serve(Deaf(), execution_timeout_s=0.1) as site:
        response = await site.client.post("/v1/completions", json={"prompt": "a"})

        assert response.status_code == 504
        assert site.app.running == {}


async def test_a_client_that_leaves_ends_its_request_in_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "engine")
    engine = Engine(body=[b"data: {}\n\n"] * 1000, content_type="text/event-stream", pause_s=0.01)

    async with serve(engine) as site:
        async with site.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            await anext(response.aiter_bytes())
        await asyncio.wait_for(engine.disconnected.wait(), 5)
        await until(lambda: not site.app.running)

    (ended,) = [json.loads(one.message) for one in caplog.records if '"duration_s"' in one.message]
    assert ended["status"] == "stopped"


async def test_a_stream_that_ends_with_vllms_error_is_logged_as_failed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "engine")
    body = [b'data: {"error": {"message": "no", "code": 500}}\n\n', b"data: [DONE]\n\n"]

    async with serve(Engine(body=body, content_type="text/event-stream")) as site:
        await site.client.post("/v1/chat/completions", json={**CHAT, "stream": True})

    assert '"status": "failed"' in caplog.text


async def test_an_app_that_raises_ends_its_request_with_500() -> None:
    class Broken(Engine):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            del scope, receive, send
            raise RuntimeError("the script says so")

    async with serve(Broken()) as site:
        response = await site.client.post("/v1/completions", json={"prompt": "a"})
        # The worker serves on.
        assert (await site.client.get("/ping")).status_code == 204

    assert (response.status_code, response.json()["retryable"]) == (500, False)


async def test_the_health_check_follows_the_state_and_a_worker_that_ends_refuses_with_retry_after() -> None:
    async with serve(Engine()) as site:
        answers = [(await site.client.get("/ping")).status_code]
        site.health.state = Health.READY
        answers.append((await site.client.get("/ping")).status_code)
        site.health.state = Health.DRAINING
        answers.append((await site.client.get("/ping")).status_code)
        site.app.refusal = WorkerShutdownError("the worker is ending; try again")
        refused = await site.client.post("/v1/completions", json={"prompt": "a"})

    assert answers == [204, 200, 503]
    assert site.health.drain_answers == 1
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


async def test_a_websocket_needs_an_open_route_too() -> None:
    class Realtime(Engine):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            websocket = WebSocket(scope, receive, send)
            await websocket.accept()
            await websocket.send_text((await websocket.receive_text()).upper())
            await websocket.close()

        async def app(self) -> App:
            return self

    async with serve(Realtime()) as site, aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{site.url}/v1/realtime") as connection:
            await connection.send_str("hello")
            assert await connection.receive_str() == "HELLO"
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(f"{site.url}/sleep")

    assert refused.value.status == 403


async def test_a_client_that_leaves_while_it_sends_its_body_reaches_no_engine() -> None:
    engine = Engine()

    async with serve(engine) as site:
        address = site.client.base_url
        _, writer = await asyncio.open_connection(address.host, address.port)
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        )
        writer.write(head.encode())
        await until(lambda: site.app.running)
        writer.close()
        await until(lambda: not site.app.running)

    assert engine.requests == []


async def test_a_client_that_leaves_while_it_uploads_a_file_has_stopped_its_request() -> None:
    """Whatever the app still answers: vLLM's says 400, as the form has no end."""

    class Form(Engine):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            with suppress(ClientDisconnect):
                await Request(scope, receive).form()
            await Response(status_code=400)(scope, receive, send)

    ended: list[JobTimes] = []
    async with serve(Form(), on_ended=ended.append) as site:
        address = site.client.base_url
        _, writer = await asyncio.open_connection(address.host, address.port)
        kind = "content-type: multipart/form-data; boundary=b\r\ncontent-length: 100"
        writer.write(f"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\n{kind}\r\n\r\n--b\r\n".encode())
        await until(lambda: site.app.running)
        writer.close()
        await until(lambda: ended)

    assert ended[0].outcome == "stopped"


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_an_answer_says_what_it_cost_if_its_client_asks() -> None:
    async with serve(Engine(body=[b'{"id": "x"}'])) as served:
        answer = await served.client.post("/v1/completions", json={"prompt": "a", "include_costs": True})
        plain = await served.client.post("/v1/completions", json={"prompt": "a"})

    assert answer.json()["costs"]["decode_s"] == 0.3
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert plain.json() == {"id": "x"}


async def test_a_stream_has_the_costs_before_its_end() -> None:
    ended: list[JobTimes] = []
    engine = Engine(body=chat_chunks("a"), content_type="text/event-stream")
    async with serve(engine, on_ended=ended.append) as served:
        body = {"messages": [], "stream": True, "include_costs": True}
        answer = await served.client.post("/v1/chat/completions", json=body)
        await until(lambda: ended)

    assert ended[0].is_stream
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["costs"]["prefill_s"] == 0.2


async def test_a_requests_times_are_its_own_and_in_its_clients_trace() -> None:
    ended: list[JobTimes] = []
    costs = Costs(0.0)
    async with serve(Engine(), costs=costs, on_ended=ended.append) as served:
        headers = {"traceparent": TRACEPARENT, "x-request-id": "request-1"}
        await served.client.post("/v1/completions", json={"prompt": "a", "model": "tiny"}, headers=headers)
        await until(lambda: ended)

    (times,) = ended
    assert not times.is_stream
    assert (times.job_id, times.traceparent, times.served_model) == ("request-1", TRACEPARENT, "tiny")
    assert (times.route, times.outcome) == ("/v1/completions", "completed")
    assert times.delivery_count > 0
    assert costs.by_model["tiny"].jobs == 1


async def test_a_request_whose_body_is_still_on_its_way_ends_at_once_when_it_is_aborted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.server.request.ABORT_GRACE_S", 3600)
    engine = Engine()

    async with serve(engine, execution_timeout_s=0.05) as site:
        address = site.client.base_url
        reader, writer = await asyncio.open_connection(address.host, address.port)
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        )
        writer.write(head.encode())
        status = await reader.readline()
        writer.close()

    assert b" 504 " in status
    assert engine.requests == []


async def test_the_first_output_after_a_freeze_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "engine")

    async with serve(Engine()) as site:
        await site.client.post("/v1/completions", json={"prompt": "a"})
        await until(lambda: not site.app.running)
        site.app.on_thaw(312.0)
        await site.client.get("/ping")
        for _ in range(2):
            await site.client.post("/v1/completions", json={"prompt": "a"})

    assert "Restored: the process did not run for 312.0 s; 0 requests in progress" in caplog.text
    assert caplog.text.count("First output since the restore") == 1
    assert '"first_take"' in caplog.text


@pytest.mark.parametrize("frozen", [False, True], ids=["idle", "frozen"])
async def test_an_idle_connection_is_closed_when_it_was_idle_for_long_but_not_by_a_freeze(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = server_config(Engine())
    config.load()
    connection = _Connection(config, ServerState(), {})
    connection.transport = mock.Mock(is_closing=lambda: False)
    monkeypatch.setattr(CLOCK, "_thawed_at", CLOCK.now() - config.timeout_keep_alive * (0.5 if frozen else 2))

    connection.timeout_keep_alive_handler()

    assert connection.transport.close.called is not frozen
    assert (connection.timeout_keep_alive_task is not None) is frozen
    if connection.timeout_keep_alive_task is not None:
        connection.timeout_keep_alive_task.cancel()
