"""Spirit's emulator in a thread, and our job loop with the real client of its agent in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from emulator.app import Emulator, run_in_thread
from emulator.spirit.settings import SpiritEmulatorSettings
from engine.backend.app import App, Message, Receive, Send
from engine.jobs import pipeline
from engine.queue.admission import Admission
from engine.queue.bucket import Bucket
from engine.queue.job_loop import JobLoop, Timeouts
from engine.queue.spirit_client import SpiritClient
from tests.scripted_worker import ScriptedEngine
from tests.unit.queue.fakes import FakeLoad

KEY = "a-key-of-the-tests"
ID = "8f2c4a1b9d0e"


class GatedEngine(ScriptedEngine):
    """Streams a chat's words, each only once `go` is released; records requests and disconnects.

    The message "fail" gets vLLM's kind of error response.
    """

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Semaphore(10**6)
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.disconnected = asyncio.Event()
        self.failed = False

    def failure(self) -> str | None:
        return "the engine's process is dead" if self.failed else None

    async def app(self) -> App:
        return self._gated

    async def _gated(self, scope: Message, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append((headers, body))

        async def answer(status: int, kind: bytes, content: bytes, *, more: bool = False) -> None:
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
            await send({"type": "http.response.body", "body": content, "more_body": more})

        try:
            request = json.loads(body)
        except ValueError:
            return await answer(400, b"application/json", b'{"error": {"message": "not JSON"}}')
        text = request["messages"][-1]["content"]
        if text == "fail":
            return await answer(404, b"application/json; charset=utf-8", b'{"error":  {"message": "no such model"}}')
        if not request.get("stream"):
            await self._wait(receive)
            return await answer(200, b"application/json", json.dumps({"said": text}).encode())
        await answer(200, b"text/event-stream; charset=utf-8", b"", more=True)
        for word in text.split(" "):
            if not await self._wait(receive):
                return None
            await send({"type": "http.response.body", "body": f'data: "{word}"\n\n'.encode(), "more_body": True})
        return await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _wait(self, receive: Receive) -> bool:
        """Wait for `go`; return whether the client is still there."""
        waits = {asyncio.ensure_future(self.go.acquire()), asyncio.ensure_future(receive())}
        done, left = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in left:
            wait.cancel()
        if any(isinstance(wait.result(), dict) for wait in done):
            self.disconnected.set()
            return False
        return True


class SpiritSite:
    """Clients of the emulator, and the worker's job loop."""

    def __init__(self, emulator: Emulator, client: httpx.AsyncClient, engine: GatedEngine, **timeouts: float) -> None:
        self.url = emulator.url
        self.engine = engine
        self.timeouts = Timeouts(**timeouts)
        self._client = client
        self.loop: JobLoop
        self.running: asyncio.Task[int]
        self.late: list[asyncio.Task[httpx.Response]] = []
        """Requests that are answered when the loop has ended, and then in `late_responses`."""
        self.late_responses: list[httpx.Response] = []

    def serve(self, queue: SpiritClient) -> None:
        async def handler(job: dict[str, Any]) -> AsyncGenerator[Any, None]:
            outputs = pipeline.run(job, self.engine)
            async with pipeline.aclosing_on_task_exit(outputs):
                async for output in outputs:
                    yield output

        self.loop = JobLoop(
            queue, handler, Admission(FakeLoad(), 200, 10**6), failure=self.engine.failure, timeouts=self.timeouts
        )
        self.running = asyncio.create_task(self.loop.run())

    def chat(self, text: str, **fields: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}], **fields}

    async def proxied(self, text: str, **fields: Any) -> httpx.Response:
        return await self.post_proxied(json=self.chat(text, **fields))

    async def post_proxied(
        self, path: str = "/v1/chat/completions", content_type: str | None = None, **options: Any
    ) -> httpx.Response:
        headers = {"Authorization": f"{ID}-{KEY}"}
        if content_type is not None:
            headers["Content-Type"] = content_type
        return await self._client.post(path, headers=headers, **options)

    def stream(self, text: str) -> Any:
        """Return a streamed request, as an async context manager."""
        headers = {"Authorization": f"{ID}-{KEY}"}
        return self._client.stream("POST", "/v1/chat/completions", headers=headers, json=self.chat(text, stream=True))

    async def native(self, operation: str, document: dict[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return await self._client.post(f"/v1/{ID}/{operation}", headers=headers, json=document)

    async def handled(self, text: str, **fields: Any) -> httpx.Response:
        """Return the answer to a sync request of a handler's task."""
        value = {"openai_route": "/v1/chat/completions", "openai_input": self.chat(text, **fields)}
        return await self.native("sync", {"input": value})

    async def faults(self, *rules: dict[str, Any]) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        (await self._client.put("/faults", headers=headers, json={"rules": rules})).raise_for_status()

    async def state(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {KEY}"}
        document: dict[str, Any] = (await self._client.get("/state", headers=headers)).json()["endpoints"][0]
        return document

    async def ended(self, count: int = 1) -> list[dict[str, Any]]:
        """Wait until so many tasks have ended; return them, newest first."""

        async def tasks() -> list[dict[str, Any]]:
            return [task for task in (await self.state())["jobs"] if task["endedAt"] is not None]

        await self.until(tasks, count)
        return await tasks()

    @staticmethod
    async def until(poll: Callable[[], Any], count: int = 1) -> None:
        """Wait until the poll returns a list of this length."""
        async with asyncio.timeout(20):
            while len(await poll()) < count:  # noqa: ASYNC110 (another thread's state)
                await asyncio.sleep(0.02)


@asynccontextmanager
async def spirit_site(
    monkeypatch: pytest.MonkeyPatch,
    exit_status: int = 0,
    request_timeout_s: float = 170.0,
    bucket: Bucket | None = None,
    **settings: Any,
) -> AsyncIterator[SpiritSite]:
    """Run the emulator and the job loop during the block; the loop must end with this exit status.

    Args:
        monkeypatch: sets the agent's URL.
        exit_status: the loop's.
        request_timeout_s: the client's.
        bucket: the client's.
        settings: fields of `Timeouts` (`..._s`), and settings of the endpoint.
    """
    from spirit_gpu.concurrency import Concurrency
    from spirit_gpu.settings import SETTINGS

    timeouts = {name: settings.pop(name) for name in list(settings) if name.endswith("_s")}
    endpoint = {"id": ID, "workersMin": 0, "workersMax": 0, "agentPorts": [0], **settings}
    document = SpiritEmulatorSettings.model_validate({"port": 0, "apiKeys": [KEY], "endpoints": [endpoint]})
    with run_in_thread(document) as emulator:
        (agent,) = emulator.agents.urls(ID).values()
        monkeypatch.setattr(SETTINGS, "_agent_url", agent)
        concurrency = Concurrency(None)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=emulator.url, timeout=30, limits=limits) as client:
            site = SpiritSite(emulator, client, GatedEngine(), **timeouts)
            async with SpiritClient(concurrency, request_timeout_s, bucket) as queue:
                site.serve(queue)
                yield site
                site.loop.stop()
                async with asyncio.timeout(20):
                    assert await site.running == exit_status
            assert concurrency.current_jobs == set()
            async with asyncio.timeout(10):
                site.late_responses = await asyncio.gather(*site.late)
