"""One job is one call of an ASGI app: method, route and body in; status and body out; leaving early is a disconnect.

No socket, no URL, no second HTTP server: the app is called directly, so there is no host to reach but the app.
Source: the ASGI HTTP specification, version 2.3, in which a server reports a client that left by `http.disconnect`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import asynccontextmanager, suppress
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any

from engine.backend.inline_executor import SHORT, SHORT_BYTES
from engine.backend.merging import MERGEABLE
from engine.errors import EngineError
from engine.jobs.inputs import Request

if TYPE_CHECKING:
    from starlette.applications import Starlette

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Coroutine[Any, Any, None]]

# How long an app may take to notice that its client has left before its task is cancelled.
DISCONNECT_GRACE_S = 5.0

_log = logging.getLogger(__name__)


async def start(app: Starlette) -> asyncio.Task[None]:
    """Start what a server runs around an app, its lifespan; it runs until the task is cancelled.

    A task of its own: a loop that ends cancels its tasks first, and so a lifespan ends from the inside out. Left to the
    loop's end as open generators, the contexts in it end in any order, with errors.

    Returns:
        The task, for the caller to keep.
    """
    started = asyncio.Event()

    async def live() -> None:
        try:
            async with app.router.lifespan_context(app):
                started.set()
                await asyncio.Event().wait()
        finally:
            started.set()

    task = asyncio.create_task(live(), name="the app's lifespan")
    await started.wait()
    if task.done():
        await task
    return task


class Response:
    """What the app answers: a status, a content type, and a body that is still coming in."""

    def __init__(self) -> None:
        self.status = 0
        self.content_type = ""
        self._body = bytearray()
        self._complete = False
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body: each chunk is all that has gathered since the last one was taken.

        Raises:
            EngineError: the app broke off before the end of the body.
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
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def ended(self, within_s: float) -> bool:
        """Wait until nothing more comes in, `within_s` seconds at most; say whether it is so."""
        if within_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._ended.wait()
        return self._ended.is_set()

    async def _change(self) -> None:
        if self._ended.is_set():
            raise EngineError("the engine broke off without an answer")
        self._changed.clear()
        await self._changed.wait()


class _Exchange(Response):
    """The server's side of a response: what the app calls, and what tells the app that its client has left."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request: Request | None = request
        self._left = asyncio.Event()

    async def receive(self) -> Message:
        if self._request is not None:
            body, self._request = self._request.body or b"", None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._left.is_set():
            # Dropped, as servers do: an error raised here would leave vLLM's generators to the garbage collector, and
            # the request to run on in the engine until it comes.
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self.content_type = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip()
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

    async def leave(self, app: asyncio.Future[None]) -> None:
        """Return when the app has ended: it is told first, and cancelled only if it does not listen."""
        self._left.set()
        try:
            await asyncio.wait({app}, timeout=DISCONNECT_GRACE_S)
        finally:
            app.cancel()
        await asyncio.wait({app})


@asynccontextmanager
async def call(app: App, request: Request, request_id: str = "") -> AsyncIterator[Response]:
    """Call the app and yield its response as soon as it has begun.

    Leaving the block before the body has ended is a disconnect: the app is told, and its task has ended by the time
    that the block is left.

    Args:
        app: any ASGI 3 application.
        request: what to call it with.
        request_id: stands in the `X-Request-Id` header, if it can; vLLM makes its own ids from it.

    Raises:
        EngineError: the app raised, or ended without an answer.
    """
    exchange = _Exchange(request)
    answering = app(_scope(request, request_id), exchange.receive, exchange.send)
    task = asyncio.create_task(answering, context=_context(request))
    task.add_done_callback(exchange.app_ended)
    try:
        await exchange.started()
        yield exchange
    finally:
        await exchange.leave(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("%s %s failed in the engine", request.method, request.path, exc_info=error)


def _scope(request: Request, request_id: str) -> Message:
    headers = [(b"host", b"worker"), (b"content-type", b"application/json")]
    if request.body is not None:
        headers.append((b"content-length", str(len(request.body)).encode()))
    if request_id and request_id.isascii() and request_id.isprintable():
        headers.append((b"x-request-id", request_id.encode()))
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
    """What code deep inside vLLM, which is handed little of the request, can ask about it."""
    context = copy_context()
    context.run(SHORT.set, len(request.body or b"") <= SHORT_BYTES)
    context.run(MERGEABLE.set, request.mergeable)
    return context
