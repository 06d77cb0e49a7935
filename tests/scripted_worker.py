"""A worker process with the real SDK and the real job loop, whose engine repeats the prompt, or a chat's last message.

With `n`, it does so that many times. A streamed answer comes word by word, `PAUSE_S` apart. With `LOOP=stock`, the
handler runs under the SDK's own loop. With `PLATFORM=spirit`, that SDK is Spirit's. On a load-balancing endpoint, the
engine is served over HTTP; loading it takes `LOAD_S`, and leaves a forked process with `FORKS`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import uvloop

from engine.backend.app import App, Message, Receive, Send
from engine.backend.routes import SERVING
from engine.backend.statistics import Statistics
from engine.backend.vllm_engine import VLLMEngine
from engine.cold_start import WORKER
from engine.config.settings import Settings
from engine.jobs import pipeline
from engine.queue import runpod_client, spirit_client, spirit_sdk
from engine.queue.bucket import Bucket
from engine.queue.protocol import JobQueue
from engine.queue.spirit_proxy_mode import ProxyMode
from engine.server.health_check import HealthCheck
from engine.server.listeners import Listeners
from engine.server.loading import LoadingServer
from engine.telemetry.job_times import RequestStats
from engine.worker import Worker
from tests.scripted import scripted_files

PAUSE_S = float(os.environ.get("PAUSE_S", "0.005"))


class ScriptedEngine:
    """What the worker needs of an engine. It is never full, and fails only after `FAILS_AFTER_S`."""

    max_model_len = 2048
    max_num_seqs = int(os.environ.get("CONCURRENCY", "16"))
    batch_interval_s = 0.0
    open_routes = SERVING
    cache_tokens = 10**6
    exports_traces = False
    device_attributes = MappingProxyType({"gpu.name": "cpu", "gpu.count": 1})
    files = scripted_files(Path("/nowhere"))

    def __init__(self) -> None:
        self.statistics = Statistics()
        self._fails_at = time.monotonic() + float(os.environ.get("FAILS_AFTER_S", "inf"))

    def failure(self) -> str | None:
        return None if time.monotonic() < self._fails_at else "the engine's process is dead"

    def has_route(self, path: str) -> bool:
        del path
        return True

    def event_tokens(self, path: str) -> int | None:
        del path
        return 1

    def pop_request_stats(self, job_id: str) -> list[RequestStats]:
        del job_id
        return []

    async def app(self) -> App:
        return self._respond

    async def _respond(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._echo(receive, send)
            return
        body = (await receive())["body"]
        if scope["path"] == "/cold_start":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            document = json.dumps(WORKER.document()).encode()
            await send({"type": "http.response.body", "body": document, "more_body": False})
            return
        request = json.loads(body)
        text = request["prompt"] if "prompt" in request else request["messages"][-1]["content"]
        text *= request.get("n", 1)
        kind = b"text/event-stream" if request.get("stream") else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if request.get("stream"):
            leaving = asyncio.ensure_future(receive())
            for word in text.split(" "):
                if self.failure() is not None:
                    raise RuntimeError("the engine's process is dead")
                event = {"choices": [{"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}]}
                body = f"data: {json.dumps(event)}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await asyncio.wait({leaving}, timeout=PAUSE_S)
                if leaving.done():
                    return
            leaving.cancel()
        else:
            await asyncio.sleep(PAUSE_S)
        last = b"data: [DONE]\n\n" if request.get("stream") else json.dumps({"said": text}).encode()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _echo(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})


ENGINE = ScriptedEngine()


async def handler(job: dict[str, Any]) -> AsyncGenerator[Any, None]:
    outputs = pipeline.run(job, ENGINE)
    async with pipeline.aclosing_on_task_exit(outputs):
        async for output in outputs:
            yield output


def serve_http(settings: Settings) -> int:
    listeners = Listeners.open(settings)
    own_port = settings.port_health if settings.port_health != settings.port else None
    check = HealthCheck(settings.health_check_path, own_port)
    with LoadingServer(listeners, check) as loading:
        if "FORKS" in os.environ and os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(float(os.environ.get("LOAD_S", "0")))
        worker = Worker(cast("VLLMEngine", ENGINE), settings)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(worker.serve_http(listeners, loading, check))


def main() -> int:
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    logging.basicConfig(level=logging.INFO)
    settings = Settings.read()
    if os.environ.get("LOOP") == "stock":
        vars(spirit_sdk if settings.queue == "spirit" else runpod_client)["missing_interface"] = lambda: "set by a test"
    if settings.serves_http:
        return serve_http(settings)
    worker = Worker(cast("VLLMEngine", ENGINE), settings)

    async def run(queue: JobQueue) -> int:
        return await worker.serve(queue, handler)

    if settings.queue == "spirit":
        running = spirit_sdk.start_heartbeat()
        if running is None:
            return ProxyMode(ENGINE, worker.max_concurrency, settings.drain_timeout_s).serve()
        return spirit_client.serve(run, running, settings.spirit_request_timeout_s, Bucket.of(settings))
    return runpod_client.serve(handler, run, worker.max_concurrency, ENGINE.failure, Bucket.of(settings))


if __name__ == "__main__":
    sys.exit(main())
