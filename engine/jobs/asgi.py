"""Calls vLLM's ASGI app for one job: method, route and body in; status and body out; leaving early is a disconnect.

There is no socket, no URL and no second HTTP server: the app is called directly, so no other host can be reached.
Source: the ASGI HTTP specification, version 2.3, in which `http.disconnect` reports a client that has left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from contextvars import Context, copy_context

from engine.backend.app import App, Message
from engine.backend.inline_executor import SHORT, SHORT_BYTES
from engine.backend.merging import MERGEABLE
from engine.errors import EngineError
from engine.jobs.request import JSON, Request
from engine.run_clock import CLOCK
from engine.telemetry.job_times import CURRENT

# A longer body arrives in pieces, as from a server: vLLM's parser of forms takes one of 25 MB eight times faster so.
_PIECE_BYTES = 1024 * 1024
# How long the app may take to end its request after a disconnect, before its task is cancelled.
DISCONNECT_GRACE_S = 5.0

_log = logging.getLogger(__name__)


class Response:
    """The app's response: status, content type, and a body that is still arriving.

    Attributes:
        content_type: without parameters.
        content_type_header: as the app wrote it.
    """

    def __init__(self) -> None:
        self.status = 0
        self.content_type = ""
        self.content_type_header = ""
        self._body = bytearray()
        self._complete = False
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body; each chunk is all that has arrived since the last one.

        Raises:
            EngineError: the app stopped before the end of the body.
        """
        while True:
            if self._body:
                chunk = bytes(self._body)
                self._body.clear()
                yield chunk
            elif self._complete:
                return
            else:
                await self._change()

    async def body(self) -> bytes:
        """Return the complete body."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def wait_complete(self, timeout_s: float) -> bool:
        """Wait until the response has ended, at most `timeout_s` seconds; return whether it has."""
        if timeout_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._ended.wait()
        return self._ended.is_set()

    async def _change(self) -> None:
        if self._ended.is_set():
            raise EngineError("the engine stopped without a response")
        self._changed.clear()
        await self._changed.wait()


class _ASGIConnection(Response):
    """The server's side of a response: the callables of ASGI, and the disconnect."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._unread: memoryview | None = memoryview(request.body or b"")
        self._disconnected = asyncio.Event()

    async def receive(self) -> Message:
        if self._unread is not None:
            body, rest = bytes(self._unread[:_PIECE_BYTES]), self._unread[_PIECE_BYTES:]
            self._unread = rest or None
            return {"type": "http.request", "body": body, "more_body": self._unread is not None}
        await self._disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._disconnected.is_set():
            # Dropped, as servers do. An error raised here would leave vLLM's generators to the garbage collector, and
            # until it runs, the request would go on in the engine.
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self.content_type_header = headers.get(b"content-type", b"").decode("latin-1")
            self.content_type = self.content_type_header.partition(";")[0].strip()
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                self._complete = True
                self._ended.set()
        self._changed.set()

    async def started(self) -> None:
        while not self.status:
            await self._change()

    def app_ended(self, _: asyncio.Future[None]) -> None:
        self._ended.set()
        self._changed.set()

    async def disconnect(self, app: asyncio.Future[None]) -> None:
        """Report the disconnect and wait until the app has ended; cancel it if it does not react in time."""
        self._disconnected.set()
        try:
            await CLOCK.wait({app}, DISCONNECT_GRACE_S)
        finally:
            app.cancel()
        await asyncio.wait({app})


@asynccontextmanager
async def stream(app: App, request: Request, request_id: str = "") -> AsyncIterator[Response]:
    """Call the app and yield its response as soon as it has started.

    Leaving the block before the end of the body is a disconnect: it is reported to the app, whose task has ended when
    the block is left.

    Args:
        app: any ASGI 3 application.
        request: what to call it with.
        request_id: sent as `X-Request-Id` if it is printable ASCII; vLLM makes its own request ids from it.

    Raises:
        EngineError: the app raised, or ended without a response.
    """
    connection = _ASGIConnection(request)
    responding = app(_scope(request, request_id), connection.receive, connection.send)
    task = asyncio.create_task(responding, context=_context(request))
    task.add_done_callback(connection.app_ended)
    try:
        await connection.started()
        yield connection
    finally:
        await connection.disconnect(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("%s %s failed in the engine", request.method, request.path, exc_info=error)


def _scope(request: Request, request_id: str) -> Message:
    headers = [(b"host", b"worker"), (b"content-type", request.content_type.encode("latin-1"))]
    if request.body is not None:
        headers.append((b"content-length", str(len(request.body)).encode()))
    if request_id and request_id.isascii() and request_id.isprintable():
        headers.append((b"x-request-id", request_id.encode()))
    if (times := CURRENT.get()) is not None and (traceparent := times.engine_traceparent) is not None:
        headers.append((b"traceparent", traceparent.encode()))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query.encode(),
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        "state": {},
    }


def _context(request: Request) -> Context:
    """Return a context that tells code deep inside vLLM, which does not see the request, about it."""
    context = copy_context()
    context.run(SHORT.set, request.content_type == JSON and len(request.body or b"") <= SHORT_BYTES)
    context.run(MERGEABLE.set, request.mergeable)
    return context
