"""Sends each request of a load-balancing endpoint to one of its workers, and streams both ways. Nothing is retried."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import aiohttp
from starlette.types import ASGIApp, Receive, Scope, Send
from yarl import URL

from emulator.api.auth import AppContext
from emulator.api.fault_middleware import RouteName
from emulator.api.ports import Ports
from emulator.balancer.affinity import HEADER, Affinity
from emulator.balancer.endpoint import BalancedWorker, BalancerEndpoint
from emulator.balancer.requests import BalancedRequest
from emulator.core.long_poll import client_disconnect
from emulator.errors import (
    APIError,
    BadGatewayError,
    ContentTooLargeError,
    NotFoundError,
    ProcessingTimeoutError,
    UnauthorizedError,
)
from emulator.integers import parse_integer

# RFC 9110, 7.6.1, and what the balancer's own connections have.
_HOP_BY_HOP: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
# The key is for the platform; the others are made anew.
_NOT_FORWARDED: Final = _HOP_BY_HOP | {b"authorization", b"host", b"expect"}
_NOT_RETURNED: Final = _HOP_BY_HOP | {b"date", b"server", HEADER}
_WEBSOCKET_HEADERS: Final = (b"sec-websocket-",)
# RFC 6455: an internal error of the server.
_INTERNAL_ERROR: Final = 1011
_CHUNK_BYTES: Final = 65536


def endpoint_of_port(ports: Ports) -> Callable[[Scope], str]:
    """Return a function that returns the endpoint whose own port a request came to."""
    return lambda scope: ports.owner(scope["server"][1])[0]


def balancer_route_name(endpoint: Callable[[Scope], str]) -> Callable[[Scope], RouteName]:
    """Return a function that returns what faults know of a request to an endpoint's own port."""
    return lambda scope: RouteName(endpoint(scope), "balancer")


class BalancerApp:
    """The ASGI app of the endpoints' own ports.

    Args:
        context: of the emulator's app.
        endpoint: returns the id of the endpoint that a request is for.
    """

    def __init__(self, context: AppContext, endpoint: Callable[[Scope], str]) -> None:
        self._context = context
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        exchange = _Exchange(scope, receive, send)
        try:
            endpoint = self._context.endpoints.get(self._endpoint(scope))
            if not isinstance(endpoint, BalancerEndpoint):
                raise NotFoundError("there is no such load-balancing endpoint")
            if not self._context.is_api_key(_key(exchange.headers)):
                raise UnauthorizedError("no valid API key; send 'Authorization: Bearer KEY'")
            await exchange.run(endpoint)
        except APIError as error:
            await exchange.refuse(error)


class MountedBalancerApp:
    """The same below `/balancer/ID` of the emulator's own port, for its page."""

    def __init__(self, context: AppContext) -> None:
        self._app: ASGIApp = BalancerApp(context, lambda scope: scope["path_params"]["balancer"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request with the path that its worker gets."""
        path = "/" + scope["path_params"]["path"]
        await self._app({**scope, "path": path, "raw_path": path.encode(), "root_path": ""}, receive, send)


class _Exchange:
    """One request or WebSocket between a client and a worker."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._is_websocket = scope["type"] == "websocket"
        self._has_started = False
        self._worker = ""
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]

    @property
    def _has_body(self) -> bool:
        return bool(_header(self.headers, b"content-length") or _header(self.headers, b"transfer-encoding"))

    async def run(self, endpoint: BalancerEndpoint) -> None:
        """Wait for a worker and serve.

        Raises:
            APIError: the client gets this response.
        """
        limit = endpoint.settings.max_body_bytes
        if (parse_integer(_header(self.headers, b"content-length")) or 0) > limit:
            raise ContentTooLargeError(f"the body exceeds {limit} bytes")
        method = "WEBSOCKET" if self._is_websocket else self._scope["method"]
        request = endpoint.queue.add(f"{method} {self._scope['path']}")
        try:
            worker = await self._choose_worker(endpoint)
            if worker is None:
                return
            endpoint.queue.start(request, worker.id)
            self._worker = worker.id
            async with asyncio.timeout(endpoint.settings.request_timeout_s):
                if self._is_websocket:
                    await self._serve_websocket(endpoint, worker, request)
                else:
                    await self._serve_http(endpoint, worker, request)
        except aiohttp.ClientError as error:
            await self._break_off(request, BadGatewayError(f"the worker broke the connection: {type(error).__name__}"))
        except TimeoutError:
            await self._break_off(request, ProcessingTimeoutError("the worker took too long"))
        except APIError as error:
            request.status_code = int(error.status)
            raise
        finally:
            endpoint.queue.end(request)

    async def _choose_worker(self, endpoint: BalancerEndpoint) -> BalancedWorker | None:
        affinity = Affinity.parse(_header(self.headers, HEADER))
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # While a request waits, nothing of its body is read, so that its client's disconnect cannot be seen either.
        if self._is_websocket or self._has_body:
            return await endpoint.choose_worker(affinity, never)
        async with client_disconnect(self._receive) as disconnect:
            return await endpoint.choose_worker(affinity, disconnect)

    async def _serve_http(self, endpoint: BalancerEndpoint, worker: BalancedWorker, request: BalancedRequest) -> None:
        limit = endpoint.settings.max_body_bytes
        body = _RequestBody(self._receive, limit, is_empty=not self._has_body)
        answering = asyncio.ensure_future(
            endpoint.session.request(
                self._scope["method"],
                _url(worker.url, self._scope),
                headers=self._forwarded_headers(),
                data=body.chunks() if self._has_body else None,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )
        )
        async with body.watched_client(answering):
            response = await answering
            async with response:
                await self._start_response(response, request)
                sent = 0
                async for chunk in response.content.iter_any():
                    sent += len(chunk)
                    if sent > limit:
                        await self._break_off(request, BadGatewayError(f"the response exceeds {limit} bytes"))
                        return
                    endpoint.count_output(request, worker.id)
                    await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
                request.is_complete = True

    async def _start_response(self, response: aiohttp.ClientResponse, request: BalancedRequest) -> None:
        headers = [(name.lower(), value) for name, value in response.raw_headers]
        headers = [(name, value) for name, value in headers if name not in _NOT_RETURNED]
        request.status_code = response.status
        self._has_started = True
        headers.append((HEADER, self._worker.encode()))
        await self._send({"type": "http.response.start", "status": response.status, "headers": headers})

    async def _serve_websocket(
        self, endpoint: BalancerEndpoint, worker: BalancedWorker, request: BalancedRequest
    ) -> None:
        await self._receive()  # websocket.connect
        protocols = self._scope.get("subprotocols", [])
        url = _url(worker.url, self._scope)
        try:
            async with endpoint.session.ws_connect(
                url, protocols=protocols, headers=self._forwarded_headers(), max_msg_size=0, autoclose=False
            ) as upstream:
                self._has_started, request.status_code = True, 101
                headers = [(HEADER, self._worker.encode())]
                await self._send({"type": "websocket.accept", "subprotocol": upstream.protocol, "headers": headers})
                await self._relay(upstream, endpoint, request)
                request.is_complete = True
        except aiohttp.WSServerHandshakeError as error:
            request.status_code, request.is_complete = error.status, True
            text = json.dumps({"error": f"the worker answered with status {error.status}"})
            retry_after = None if error.headers is None else error.headers.get("retry-after")
            more = [] if retry_after is None else [(b"retry-after", retry_after.encode())]
            await self._deny(error.status, text, more)

    async def _relay(
        self, upstream: aiohttp.ClientWebSocketResponse, endpoint: BalancerEndpoint, request: BalancedRequest
    ) -> None:
        async def to_worker() -> None:
            while (message := await self._receive())["type"] == "websocket.receive":
                if message.get("text") is not None:
                    await upstream.send_str(message["text"])
                else:
                    await upstream.send_bytes(message["bytes"])
            await upstream.close(code=message.get("code", 1000))

        async def to_client() -> None:
            async for message in upstream:
                if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                    break
                endpoint.count_output(request, self._worker)
                kind = "text" if message.type is aiohttp.WSMsgType.TEXT else "bytes"
                await self._send({"type": "websocket.send", kind: message.data})
            code = upstream.close_code or _INTERNAL_ERROR
            with suppress(RuntimeError, OSError):  # The client has closed it already.
                await self._send({"type": "websocket.close", "code": code})

        both = [asyncio.ensure_future(to_worker()), asyncio.ensure_future(to_client())]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
        finally:
            for one in both:
                one.cancel()
            await asyncio.wait(both)

    def _forwarded_headers(self) -> list[tuple[str, str]]:
        dropped = _NOT_FORWARDED if not self._is_websocket else _NOT_FORWARDED | {b"content-length"}
        return [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self.headers
            if name not in dropped and not (self._is_websocket and name.startswith(_WEBSOCKET_HEADERS))
        ]

    async def refuse(self, error: APIError) -> None:
        """Answer with an error of the balancer."""
        if self._has_started:
            return
        await self._deny(int(error.status), json.dumps({"error": str(error)}))

    async def _deny(self, status: int, text: str, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
        kind = "websocket.http.response" if self._is_websocket else "http.response"
        headers = [(b"content-type", b"application/json"), *more]
        if self._worker:
            headers.append((HEADER, self._worker.encode()))
        await self._send({"type": f"{kind}.start", "status": status, "headers": headers})
        await self._send({"type": f"{kind}.body", "body": text.encode(), "more_body": False})

    async def _break_off(self, request: BalancedRequest, error: APIError) -> None:
        """Answer with an error; if the response has begun, close the connection, so that its client sees that."""
        if not self._has_started:
            request.status_code, request.is_complete = int(error.status), True
            await self.refuse(error)
        elif self._is_websocket:
            await self._send({"type": "websocket.close", "code": _INTERNAL_ERROR})
        else:
            self._scope["state"]["transport"].abort()


class _RequestBody:
    """The body of a client's request, and its disconnect, which come from the same `receive`."""

    def __init__(self, receive: Receive, limit: int, *, is_empty: bool) -> None:
        self._receive = receive
        self._limit = limit
        self._is_read = asyncio.Event()
        if is_empty:
            self._is_read.set()
        self._too_large = False
        self._client_has_gone = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._client_has_gone = True
                raise aiohttp.ClientConnectionError("the client has gone")
            size += len(message.get("body", b""))
            if size > self._limit:
                self._too_large = True
                raise aiohttp.ClientPayloadError("the body is too large")
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                self._is_read.set()
                return

    @asynccontextmanager
    async def watched_client(self, answering: asyncio.Future[Any]) -> AsyncIterator[None]:
        """Cancel the block when the client disconnects.

        Raises:
            ContentTooLargeError: the body exceeds the limit.
        """
        block = asyncio.current_task()
        has_gone = False

        async def watch() -> None:
            nonlocal has_gone
            await self._is_read.wait()
            while (await self._receive())["type"] != "http.disconnect":
                pass
            has_gone = True
            if block is not None:
                block.cancel()

        watching = asyncio.ensure_future(watch())
        try:
            yield
        except asyncio.CancelledError:
            if not has_gone or block is None:
                raise
            block.uncancel()
        except aiohttp.ClientError:
            if self._too_large:
                raise ContentTooLargeError(f"the body exceeds {self._limit} bytes") from None
            if not self._client_has_gone:
                raise
        finally:
            watching.cancel()
            answering.cancel()


def _key(headers: list[tuple[bytes, bytes]]) -> str:
    value = _header(headers, b"authorization").strip()
    scheme, _, key = value.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else value


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> str:
    return next((value.decode("latin-1") for one, value in headers if one == name), "")


def _url(base: str, scope: Scope) -> URL:
    query = scope["query_string"].decode("latin-1")
    path = scope["raw_path"].decode("latin-1")
    return URL(f"{base}{path}?{query}" if query else f"{base}{path}", encoded=True)
