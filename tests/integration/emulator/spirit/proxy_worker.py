"""A worker with the stock SDK in proxy mode, and a local server with scripted answers; no model.

The local server runs in a thread. `POST /v1/chat/completions` answers as an OpenAI server does; with `"stream": true`
it sends an event every `PAUSE_S` seconds, as many as the last message's words. It prints when a client disconnects.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import spirit_gpu
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PAUSE_S = float(os.environ.get("PAUSE_S", "0"))
LOADS_S = float(os.environ.get("LOADS_S", "0"))


async def chat(request: Request) -> Response:
    document = await request.json()
    if document["model"] == "no-such-model":
        return JSONResponse({"error": {"message": "no such model"}}, 404)
    text = document["messages"][-1]["content"]
    if document.get("stream"):
        return StreamingResponse(events(text.split()), media_type="text/event-stream")
    message = {"role": "assistant", "content": f"echo: {text}"}
    return JSONResponse({"object": "chat.completion", "model": document["model"], "choices": [{"message": message}]})


async def events(words: list[str]) -> AsyncIterator[str]:
    try:
        for word in words:
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': word}}]})}\n\n"
            await asyncio.sleep(PAUSE_S)
            if word == "die":
                os._exit(3)
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        print("the local server's client has disconnected", flush=True)  # noqa: T201 (read by tests)
        raise


async def seen(request: Request) -> Response:
    """Answer with what arrived."""
    headers = [[name, value] for name, value in request.headers.items()]
    return JSONResponse({"method": request.method, "uri": str(request.url.path), "headers": headers})


async def tags(_request: Request) -> Response:
    return JSONResponse({"models": [{"name": "tiny"}]})


def serve(listener: socket.socket) -> None:
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/seen", seen, methods=["GET", "POST", "DELETE"]),
            Route("/api/tags", tags),
        ]
    )
    config = uvicorn.Config(app, log_config=None, lifespan="off")
    asyncio.run(uvicorn.Server(config).serve([listener]))


def start(handlers: dict[str, Any]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        threading.Thread(target=serve, args=[listener], daemon=True).start()
        checks: list[None] = []

        def check_start() -> bool:
            checks.append(None)
            return len(checks) > 2 * LOADS_S

        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        spirit_gpu.start({"mode": "proxy", "base_url": base_url, "check_start": check_start, **handlers})


if __name__ == "__main__":
    concurrency = int(os.environ.get("CONCURRENCY", "4"))
    start({"concurrency_modifier": lambda _: concurrency})
