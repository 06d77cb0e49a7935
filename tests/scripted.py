"""A scripted ASGI app that stands in for vLLM's, for tests that need no model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.backend.app import App, Message, Receive, Send
from engine.backend.files import Files
from engine.backend.routes import SERVING
from engine.telemetry.job_times import RequestStats


@dataclass
class ScriptedApp:
    """Answers each request with a scripted response. Also implements `engine.jobs.pipeline.Engine`.

    Attributes:
        body: the chunks of the response, sent `pause_s` apart.
        fails: whether it raises after the last chunk instead of ending the body.
        tokens: what `event_tokens` returns.
        unknown_routes: paths that `has_route` denies.
        failure_reason: what `failure` returns.
        files: reads the files that jobs name, of up to 1,000 bytes.
        requests: scope and body of each request.
        disconnects: number of clients that disconnected early.
        disconnected: set when a client has disconnected early.
        completed: set when a response has been sent to its end.
    """

    body: Iterable[bytes] = (b"{}",)
    status: int = 200
    content_type: str = "application/json"
    pause_s: float = 0.0
    fails: bool = False
    batch_interval_s: float = 0.0
    max_model_len: int = 2048
    open_routes: frozenset[str] = SERVING
    tokens: int | None = 1
    unknown_routes: frozenset[str] = frozenset()
    failure_reason: str | None = None
    files: Files = field(default_factory=lambda: scripted_files(Path("/nowhere")))
    requests: list[tuple[Message, bytes]] = field(default_factory=list)
    disconnects: int = 0
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)
    completed: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body, request = b"", await receive()
        while request["more_body"]:
            body, request = body + request["body"], await receive()
        self.requests.append((scope, body + request["body"]))
        disconnect = asyncio.ensure_future(receive())
        response = asyncio.ensure_future(self._respond(send))
        await asyncio.wait({disconnect, response}, return_when=asyncio.FIRST_COMPLETED)
        if not response.done():
            self.disconnects += 1
            self.disconnected.set()
        disconnect.cancel()
        response.cancel()
        await asyncio.wait({disconnect, response})
        if not response.cancelled():
            response.result()

    async def _respond(self, send: Send) -> None:
        headers = [(b"content-type", self.content_type.encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for chunk in self.body:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await asyncio.sleep(self.pause_s)
        if self.fails:
            raise RuntimeError("the script says so")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self.completed.set()

    def event_tokens(self, path: str) -> int | None:
        del path
        return self.tokens

    def pop_request_stats(self, job_id: str) -> list[RequestStats]:
        return [RequestStats(3, 2, 0.1, 0.2, 0.3)] if job_id else []

    def has_route(self, path: str) -> bool:
        return path not in self.unknown_routes

    def failure(self) -> str | None:
        return self.failure_reason

    async def app(self) -> App:
        return self


async def url_as_content(url: str, max_bytes: int) -> bytes:
    """Return the URL itself instead of what it holds."""
    return url.encode()[:max_bytes]


def scripted_files(volume: Path) -> Files:
    """Return what reads files, of up to 1,000 bytes, without a network."""
    return Files(volume, 1000, "MAX", url_as_content)


def sse(*events: dict[str, Any]) -> list[bytes]:
    """Return server-sent events, one chunk each, ending with `[DONE]` as OpenAI's streams do."""
    lines = [json.dumps(event, ensure_ascii=False) for event in events] + ["[DONE]"]
    return [f"data: {line}\n\n".encode() for line in lines]


def chat_chunks(*texts: str) -> list[bytes]:
    """Return a streamed chat completion, one event for each text."""
    role: dict[str, Any] = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    content = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    last = {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]}
    return sse(role, *content, last)
