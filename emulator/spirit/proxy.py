"""Proxied requests: `/v1/...` and `/api/...`, for workers in proxy mode (README.md, "Proxy Mode" and "Policy").

A request is a task with the whole request in it. A worker's POST to its agent is the answer, whose body is passed on as
it comes.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from emulator.api.auth import context_of
from emulator.api.bodies import CLIENT_CLOSED_REQUEST, read_body
from emulator.core.long_poll import client_disconnect
from emulator.errors import (
    BadRequestError,
    ContentTooLargeError,
    RequestTimeoutError,
    UnauthorizedError,
    UnavailableError,
)
from emulator.spirit.endpoint import SpiritEndpoint
from emulator.spirit.relay import AnswerBrokenError, Head, Relay
from emulator.spirit.task import proxied_body

METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# A Go server's `Request.Header` has no Host, and what concerns the client's connection is not the worker's.
_NOT_FORWARDED: Final = frozenset(
    {"Host", "Connection", "Proxy-Connection", "Keep-Alive", "Te", "Trailer", "Upgrade", "Transfer-Encoding", "Expect"}
)
# The gateway's own server writes these.
_NOT_RETURNED: Final = frozenset({b"date", b"server"})


async def proxied(request: Request) -> Response:
    """`/v1/...` and `/api/...`, with `Authorization: ID-KEY`."""
    endpoint = _endpoint_of_key(request)
    settings = endpoint.settings
    try:
        body = await read_body(request, settings.max_body_bytes)
    except ContentTooLargeError:
        raise BadRequestError("request body too large") from None
    if not endpoint.can_serve():
        raise UnavailableError("not enough gpu now, please try again later")
    path = request.scope["raw_path"].decode("ascii")
    uri = f"{path}?{request.url.query}" if request.url.query else path
    task_body = proxied_body(request.method, uri, _forwarded_headers(request), body)
    task = endpoint.queue.submit("sync", path, task_body, settings.first_byte_s)
    relay = endpoint.relays[task.id] = Relay()
    try:
        async with client_disconnect(request.receive) as disconnect:
            either: set[asyncio.Future[Any]] = {relay.head, disconnect}
            await asyncio.wait(either, timeout=settings.first_byte_s, return_when=asyncio.FIRST_COMPLETED)
            if disconnect.done():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
        if not relay.head.done():
            raise RequestTimeoutError("request timeout")
        return _RelayedResponse(endpoint, task.id, relay)
    finally:
        if not relay.head.done() or disconnect.done():
            _leave(endpoint, task.id, relay)


def _leave(endpoint: SpiritEndpoint, task_id: str, relay: Relay) -> None:
    relay.leave()
    endpoint.relays.pop(task_id, None)


def _endpoint_of_key(request: Request) -> SpiritEndpoint:
    """Return the service that the Authorization header names: nothing else does."""
    context = context_of(request)
    value = request.headers.get("authorization", "").strip()
    scheme, _, rest = value.partition(" ")
    is_bearer = scheme.lower() == "bearer"
    key = rest.strip() if is_bearer else value
    for name, endpoint in context.endpoints.items():
        is_key = key.startswith(f"{name}-") and context.is_api_key(key.removeprefix(f"{name}-"))
        if is_key and isinstance(endpoint, SpiritEndpoint) and (endpoint.settings.accept_bearer or not is_bearer):
            return endpoint
    raise UnauthorizedError("no valid serverless id and key; send 'Authorization: ID-KEY', without Bearer")


def _forwarded_headers(request: Request) -> dict[str, list[str]]:
    """Return the client's headers as a Go server has them: by canonical name, each with all its values."""
    headers: defaultdict[str, list[str]] = defaultdict(list)
    for name, value in request.headers.items():
        headers[name.title()].append(value)
    return {name: values for name, values in headers.items() if name not in _NOT_FORWARDED}


class _RelayedResponse(Response):
    """A worker's answer as it arrives, until its end or that of the time for the transfer."""

    def __init__(self, endpoint: SpiritEndpoint, task_id: str, relay: Relay) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._task_id = task_id
        self._relay = relay

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with client_disconnect(receive) as disconnect:
            try:
                async with asyncio.timeout(self._endpoint.settings.transfer_s):
                    complete = await self._send(self._relay.head.result(), send, disconnect)
            except TimeoutError:
                complete = False
            finally:
                _leave(self._endpoint, self._task_id, self._relay)
            if not complete:
                # The client must see that the response is not complete.
                scope["state"]["transport"].abort()
                await asyncio.wait({disconnect})

    async def _send(self, head: Head, send: Send, disconnect: asyncio.Future[None]) -> bool:
        """Send the answer; return whether it is complete."""
        headers = [(name, value) for name, value in head.headers if name not in _NOT_RETURNED]
        await send({"type": "http.response.start", "status": head.status, "headers": headers})
        while True:
            receiving = asyncio.ensure_future(self._relay.receive())
            either: set[asyncio.Future[Any]] = {receiving, disconnect}
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not receiving.done():
                    return False
                piece = receiving.result()
            except AnswerBrokenError:
                return False
            finally:
                receiving.cancel()
            await send({"type": "http.response.body", "body": piece or b"", "more_body": piece is not None})
            if piece is None:
                return True


routes = [
    Route("/v1/{path:path}", proxied, methods=list(METHODS)),
    Route("/api/{path:path}", proxied, methods=list(METHODS)),
]
