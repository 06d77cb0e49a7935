"""Injection of faults into requests to an endpoint's routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from emulator.api.auth import AppContext
from emulator.core.faults import WORKER_ROUTES, FaultKind, FaultRule, FaultTiming
from emulator.errors import NotFoundError
from emulator.settings import CONTROL_PLANE_NAMES

# Indices into the segments of `/v2/ENDPOINT/ROUTE/WORKER`, split at the slashes.
_ENDPOINT_SEGMENT = 2
_ROUTE_SEGMENT = 3
_WORKER_SEGMENT = 4
# At shutdown, how long to wait for the reply to close_notify: an idle client sends none.
_CLOSE_NOTIFY_S = 0.05


class DroppableProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with the connection's transport in the request's state, so that it can be dropped."""

    _shutting_down = False

    def on_message_begin(self) -> None:
        """Start a request."""
        super().on_message_begin()
        self.scope["state"]["transport"] = self.transport

    def shutdown(self) -> None:
        """Close the connection, now or when the response in progress has been sent."""
        self._shutting_down = True
        super().shutdown()
        self._abort_tls_soon()

    def on_response_complete(self) -> None:
        """End a request."""
        super().on_response_complete()
        self._abort_tls_soon()

    def _abort_tls_soon(self) -> None:
        is_tls = self.transport.get_extra_info("ssl_object") is not None
        if self._shutting_down and self.transport.is_closing() and is_tls:
            self.loop.call_later(_CLOSE_NOTIFY_S, self.transport.abort)


@dataclass(frozen=True)
class RouteName:
    """What faults know of a request: its endpoint and route, and the worker that sent it; empty if there is none."""

    endpoint: str = ""
    route: str = ""
    worker: str = ""


class FaultInjectionMiddleware:
    """ASGI middleware that injects the active faults; `request.state.faults` has the rules that apply.

    Args:
        app: the app.
        context: its context.
        name: returns what faults know of a request.
    """

    def __init__(self, app: ASGIApp, context: AppContext, name: Callable[[Scope], RouteName]) -> None:
        self._app = app
        self._context = context
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, with its faults."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = self._name(scope)
        rules = self._context.faults.match(name.endpoint, name.route) if name.route else []
        scope.setdefault("state", {})["faults"] = rules
        for rule in rules:
            if rule.when is FaultTiming.BEFORE and await self._inject(rule, scope, receive, send):
                return
        after = [rule for rule in rules if rule.when is FaultTiming.AFTER]
        if not after:
            await self._app(scope, receive, send)
            return
        response = _BufferedResponse(send)
        await self._app(scope, receive, response.add)
        for rule in after:
            if await self._inject(rule, scope, receive, send):
                return
        await response.send()

    async def _inject(self, rule: FaultRule, scope: Scope, receive: Receive, send: Send) -> bool:
        """Inject one fault; return whether it ends the request."""
        match rule.kind:
            case FaultKind.LATENCY:
                await asyncio.sleep(rule.latency_ms / 1000)
                return False
            case FaultKind.ERROR:
                await _send_error(rule.status, send)
                return True
            case FaultKind.DROP:
                await drop_connection(scope, receive)
                return True
            case FaultKind.KILL:
                self._kill_worker(self._name(scope))
                await drop_connection(scope, receive)
                return True
            case FaultKind.DUPLICATE | FaultKind.UNHEALTHY | FaultKind.ALTER:
                return False  # The take's route does it.

    def _kill_worker(self, name: RouteName) -> None:
        """Kill the worker that sends the request; an external one cannot be killed, and only loses its connection."""
        endpoint = self._context.endpoints.get(name.endpoint)
        if endpoint is not None:
            with suppress(NotFoundError):
                endpoint.fleet.kill(name.worker)


class _BufferedResponse:
    """A response that is sent only after faults have been injected."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._messages: list[Message] = []

    async def add(self, message: Message) -> None:
        self._messages.append(message)

    async def send(self) -> None:
        for message in self._messages:
            await self._send(message)


def runpod_route_name(scope: Scope) -> RouteName:
    """Return what a path of RunPod names.

    A batch take counts as a take. The OpenAI gateway's path `/v1/...` names no endpoint, and the control plane's paths
    name one only for itself.
    """
    path: str = scope["path"]
    if path.startswith("/v1/"):
        return RouteName(route="openai")
    segments = path.split("/")
    if path.startswith("/v2/") and segments[_ENDPOINT_SEGMENT] in CONTROL_PLANE_NAMES:
        return RouteName(route="control-plane")
    if len(segments) <= _ROUTE_SEGMENT or segments[1] != "v2":
        return RouteName()
    route = segments[_ROUTE_SEGMENT]
    if route == "job-take-batch":
        route = "job-take"
    if route not in WORKER_ROUTES:
        return RouteName(segments[_ENDPOINT_SEGMENT], route)
    if len(segments) <= _WORKER_SEGMENT:
        return RouteName()
    return RouteName(segments[_ENDPOINT_SEGMENT], route, segments[_WORKER_SEGMENT])


async def _send_error(status: int, send: Send) -> None:
    body = json.dumps({"error": "injected fault"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def drop_connection(scope: Scope, receive: Receive) -> None:
    """Close the connection without a response."""
    state: Mapping[str, Any] = scope["state"]
    state["transport"].abort()
    # If the app returns before uvicorn has processed the disconnect, it logs an error and sends a response with 500.
    while (await receive())["type"] != "http.disconnect":
        pass
