"""The scripted engine: an ASGI app that plays a script, in the place of vLLM's where a test is about something else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from engine.backend.app import App, Message, Receive, Send
from engine.backend.routes import SERVING


@dataclass
class ScriptedApp:
    """Answers each request with `status`, `content_type` and the chunks of `body`, `pause_s` apart.

    `requests` keeps the scope and the body of each request; `disconnects` counts the clients that left early; `left`
    is set when one has, and `ended` when an answer has been played to its end.
    With `fails`, it raises after the last chunk instead of ending the body.
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
    unknown: frozenset[str] = frozenset()
    failed: str | None = None
    requests: list[tuple[Message, bytes]] = field(default_factory=list)
    disconnects: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        request = await receive()
        self.requests.append((scope, request["body"]))
        leaving = asyncio.ensure_future(receive())
        playing = asyncio.ensure_future(self._play(send))
        await asyncio.wait({leaving, playing}, return_when=asyncio.FIRST_COMPLETED)
        if not playing.done():
            self.disconnects += 1
            self.left.set()
        leaving.cancel()
        playing.cancel()
        await asyncio.wait({leaving, playing})
        if not playing.cancelled():
            playing.result()

    async def _play(self, send: Send) -> None:
        headers = [(b"content-type", self.content_type.encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for chunk in self.body:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await asyncio.sleep(self.pause_s)
        if self.fails:
            raise RuntimeError("the script says so")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self.ended.set()

    def event_tokens(self, path: str) -> int | None:
        del path
        return self.tokens

    def has_route(self, path: str) -> bool:
        return path not in self.unknown

    def failure(self) -> str | None:
        return self.failed

    async def app(self) -> App:
        """Itself: it is an `engine.jobs.pipeline.Engine` too."""
        return self


def sse(*events: dict[str, Any]) -> list[bytes]:
    """Server-sent events, one chunk each, closed as OpenAI's streams are."""
    lines = [json.dumps(event, ensure_ascii=False) for event in events] + ["[DONE]"]
    return [f"data: {line}\n\n".encode() for line in lines]


def chat_chunks(*texts: str) -> list[bytes]:
    """A streamed chat answer that says these texts."""
    role: dict[str, Any] = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    said = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    last = {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]}
    return sse(role, *said, last)
