"""Where the faults strike: around every request to an endpoint's routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from emulator.api.auth import Platform
from emulator.core.faults import FaultKind, Rule, When
from emulator.errors import NotFoundError

# `/v2/ENDPOINT/ROUTE/...`
_ROUTE_PART = 3
_WORKER_PART = 4
# As the server ends, it waits no longer for the answer to its close_notify: a client that sits idle has none.
_CLOSE_NOTIFY_S = 0.05


class DroppableProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with the connection in the request's state, so that it can be dropped."""

    _ends = False

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self.scope["state"]["transport"] = self.transport

    def shutdown(self) -> None:
        """Close the connection, now or when the answer that is under way has been sent: the server ends."""
        self._ends = True
        super().shutdown()
        self._cut_off()

    def on_response_complete(self) -> None:
        """End a request."""
        super().on_response_complete()
        self._cut_off()

    def _cut_off(self) -> None:
        if self._ends and self.transport.is_closing() and self.transport.get_extra_info("ssl_object") is not None:
            self.loop.call_later(_CLOSE_NOTIFY_S, self.transport.abort)


class FaultInjection:
    """ASGI middleware that lets the platform's faults strike; what struck stands in `request.state.faults`."""

    def __init__(self, app: ASGIApp, platform: Platform) -> None:
        self._app = app
        self._platform = platform

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or fail it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint, route = _target(scope["path"])
        struck = self._platform.faults.strike(endpoint, route) if route else []
        scope.setdefault("state", {})["faults"] = struck
        if not struck:
            await self._app(scope, receive, send)
            return
        for rule in struck:
            if rule.when is When.BEFORE and await self._fail(rule, scope, receive, send):
                return
        after = [rule for rule in struck if rule.when is When.AFTER]
        if not after:
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.hold)
        for rule in after:
            if await self._fail(rule, scope, receive, send):
                return
        await answer.release()

    async def _fail(self, rule: Rule, scope: Scope, receive: Receive, send: Send) -> bool:
        """Let one fault strike; return whether the request is over with it."""
        match rule.kind:
            case FaultKind.LATENCY:
                await asyncio.sleep(rule.latency_ms / 1000)
                return False
            case FaultKind.ERROR:
                await _answer_error(rule.status, send)
                return True
            case FaultKind.DROP:
                await _drop(scope, receive)
                return True
            case FaultKind.KILL:
                self._kill(scope["path"])
                await _drop(scope, receive)
                return True
            case FaultKind.DUPLICATE:
                return False  # The take itself does it.

    def _kill(self, path: str) -> None:
        parts = path.split("/")
        endpoint = self._platform.endpoints.get(parts[_ROUTE_PART - 1])
        if endpoint is None or not endpoint.fleet.started_here(parts[_WORKER_PART]):
            raise NotFoundError("only a worker that was started here can be killed")
        endpoint.fleet.kill(parts[_WORKER_PART])


class _Answer:
    """An answer that is held back until it is released."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._messages: list[Message] = []

    async def hold(self, message: Message) -> None:
        self._messages.append(message)

    async def release(self) -> None:
        for message in self._messages:
            await self._send(message)


def _target(path: str) -> tuple[str, str]:
    """The endpoint and the route that a path names; an empty route where it names none.

    A batch is a take like another; the OpenAI gateway's plain form belongs to no endpoint by its path.
    """
    parts = path.split("/")
    if path.startswith("/v1/"):
        return "", "openai"
    if len(parts) <= _ROUTE_PART or parts[1] != "v2":
        return "", ""
    route = parts[_ROUTE_PART]
    return parts[_ROUTE_PART - 1], "job-take" if route == "job-take-batch" else route


async def _answer_error(status: int, send: Send) -> None:
    body = json.dumps({"error": "a fault was injected here"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _drop(scope: Scope, receive: Receive) -> None:
    """Close the connection with nothing said."""
    state: Mapping[str, Any] = scope["state"]
    state["transport"].abort()
    # The server answers a request that ends unanswered, unless it knows that nobody is there.
    while (await receive())["type"] != "http.disconnect":
        pass
