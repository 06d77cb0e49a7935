"""One HTTP request, or WebSocket, on its way through vLLM's app: what is logged of it, and how it is aborted."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus

from engine.backend.app import App, Message, Receive, Send
from engine.errors import JobError
from engine.jobs import deltas
from engine.jobs.cost_report import CostReport
from engine.jobs.http_server import send_error
from engine.json_codec import decode, encode
from engine.run_clock import CLOCK, Timer
from engine.telemetry.job_times import JobTimes, is_traceparent

# How long the app may take to end a request that is aborted, before its task is cancelled.
ABORT_GRACE_S = 5.0
# How long a client may take to make room in its buffers for the error that ends its response.
LAST_SEND_S = 1.0
# RFC 6455: the server goes away.
_GOING_AWAY = 1001
# In whole seconds. A full engine, or another worker, may have room then.
_RETRY_AFTER = [(b"retry-after", b"1")]
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")


class RunningRequest:
    """The callables of ASGI between uvicorn and the app.

    Args:
        scope: uvicorn's.
        receive: uvicorn's.
        send: uvicorn's.
        on_first_output: is called with the first bytes of the response's body.

    Attributes:
        id: in the log, and of vLLM's request, which has it from the header `X-Request-Id`.
        times: its times.
        costs: adds what it cost to the response.
        error: why it was aborted.
        has_left: whether its client has left before the end.
    """

    def __init__(self, scope: Message, receive: Receive, send: Send, on_first_output: Callable[[], None]) -> None:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        self.id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.scope = scope
        self.times = JobTimes(self.id)
        traceparent = next((value for name, value in scope["headers"] if name == b"traceparent"), b"").decode("latin-1")
        self.times.join(traceparent if is_traceparent(traceparent) else None)
        self.costs: CostReport | None = None
        self._held: Message | None = None
        self._document = bytearray()
        self.outputs = 0
        self.error: JobError | None = None
        self._receive = receive
        self._send = send
        self._on_first_output = on_first_output
        self._body: bytes | None = None
        self._aborted = asyncio.Event()
        self._task = asyncio.current_task()
        self._cancelling: Timer | None = None
        self._is_in_app = False
        self._status = 0
        self._is_stream = False
        self._has_failed = False
        self._is_complete = False
        self.has_left = False

    @property
    def outcome(self) -> str:
        """How it ended: "completed", "failed", or "stopped" by its client."""
        if self.has_left:
            return "stopped"
        failed = self.error is not None or self._has_failed or self._status >= HTTPStatus.BAD_REQUEST
        return "completed" if self._is_complete and not failed else "failed"

    async def body(self) -> bytes:
        """Read the whole body; what has arrived of it if the client leaves."""
        parts = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.has_left = True
                break
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        return b"".join(parts)

    def abort(self, error: JobError) -> None:
        """End the request in the engine; its client gets the error, as far as that is still possible."""
        if self.error is None and not self._is_complete:
            self.error = error
            self._aborted.set()
            if self._task is not None:
                grace_s = ABORT_GRACE_S if self._is_in_app else 0.0
                self._cancelling = CLOCK.call_later(grace_s, self._task.cancel)

    async def run(self, app: App, body: bytes | None = None) -> None:
        """Call the app.

        Args:
            app: vLLM's.
            body: of the request, if it was read.
        """
        self._body, self._is_in_app = body, True
        own = {b"x-request-id": self.id.encode()}
        replaced = {b"x-request-id"}
        if body is not None:
            own[b"content-length"] = str(len(body)).encode()
            replaced |= {b"content-length", b"transfer-encoding"}
        if (traceparent := self.times.engine_traceparent) is not None:
            own[b"traceparent"] = traceparent.encode()
            replaced |= {b"traceparent"}
        headers = [(name, value) for name, value in self.scope["headers"] if name not in replaced]
        await app(
            {**self.scope, "headers": [*headers, *own.items()]}, self._receive_unless_aborted, self._send_unless_aborted
        )

    async def end(self) -> None:
        """Send the error of an aborted request as its response, or as the last event of a stream.

        Another response stays cut off, and so does one whose client does not read.
        """
        if self._cancelling is not None:
            self._cancelling.cancel()
        if self.error is None or self._is_complete or self.has_left:
            return
        sending = asyncio.ensure_future(self._send_error(self.error))
        try:
            await CLOCK.wait({sending}, LAST_SEND_S)
        finally:
            sending.cancel()

    async def _send_error(self, error: JobError) -> None:
        with suppress(OSError, RuntimeError):  # The client has gone meanwhile.
            if not self._status:
                await self.refuse(error)
            elif self.scope["type"] == "websocket":
                await self._send({"type": "websocket.close", "code": _GOING_AWAY, "reason": str(error)[:100]})
            elif self._is_stream:
                events = f"data: {json.dumps(error.document())}\n\ndata: [DONE]\n\n".encode()
                await self._send({"type": "http.response.body", "body": events, "more_body": False})

    def is_cancelled_here(self) -> bool:
        """Return whether the task was cancelled because the request is aborted; its cancellation then has no effect."""
        return self.error is not None and self._task is not None and self._task.uncancel() == 0

    async def refuse(self, error: JobError) -> None:
        """Answer without the app."""
        self._status, self.error = int(error.status), error
        await send_error(error, self.scope, self._send, _RETRY_AFTER if error.retryable else [])
        self._is_complete = True

    async def _receive_unless_aborted(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        receiving = asyncio.ensure_future(self._receive())
        aborted = asyncio.ensure_future(self._aborted.wait())
        try:
            await asyncio.wait({receiving, aborted}, return_when=asyncio.FIRST_COMPLETED)
            if aborted.done():
                is_http = self.scope["type"] == "http"
                return {"type": "http.disconnect"} if is_http else {"type": "websocket.disconnect", "code": _GOING_AWAY}
            message = receiving.result()
        finally:
            receiving.cancel()
            aborted.cancel()
        if message["type"] == "websocket.disconnect" and self._status == HTTPStatus.SWITCHING_PROTOCOLS:
            self._is_complete = True  # A client ends a WebSocket so.
        elif message["type"].endswith(".disconnect"):
            self.has_left = not self._is_complete
        return message

    async def _send_unless_aborted(self, message: Message) -> None:
        if self._aborted.is_set():
            return
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self._status = message["status"]
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            self.times.is_stream = self._is_stream
        elif kind == "websocket.accept":
            self._status = HTTPStatus.SWITCHING_PROTOCOLS
        elif kind in ("http.response.body", "websocket.http.response.body", "websocket.send"):
            self._note_output(message)
        begun_at = CLOCK.now()
        for one in await self._with_costs(message):
            await self._send(one)
        if kind.endswith("http.response.body"):
            self.times.add_delivery(begun_at)
        if kind == "websocket.close":
            self._is_complete = True
            self._has_failed = not self._status
        elif kind.endswith("http.response.body") and not message.get("more_body", False):
            self._is_complete = True

    async def _with_costs(self, message: Message) -> list[Message]:
        """Return what is sent for a message: of a JSON document all at its end, if it says what the request cost."""
        if self.costs is None or not self.costs.wanted or not message["type"].startswith("http.response."):
            return [message]
        if message["type"] == "http.response.start":
            given = {name.lower(): value for name, value in message.get("headers", ())}
            if given.get(b"content-type", b"").startswith(b"application/json"):
                self._held = message
                return []
            return [message]
        body = message.get("body", b"")
        if self._held is None:
            return [{**message, "body": await self.costs.added_to_stream(body)}]
        self._document += body
        if message.get("more_body", False):
            return []
        document = encode(await self.costs.added_to(decode(bytes(self._document))))
        headers = [(name, value) for name, value in self._held["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(document)).encode()))
        return [{**self._held, "headers": headers}, {**message, "body": document}]

    def _note_output(self, message: Message) -> None:
        body = message.get("body") or b""
        if body or message["type"] == "websocket.send":
            self.outputs += 1
            if self.times.first_output_at is None:
                self.times.first_output_at = CLOCK.now()
                self._on_first_output()
        if self._is_stream and deltas.error_in(body.decode(errors="replace")) is not None:
            self._has_failed = True
