"""Emulators of Spirit with real workers: the stock SDK, with a trivial handler or in proxy mode."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from emulator.app import run_in_thread
from emulator.spirit.settings import SpiritEmulatorSettings
from tests.integration.emulator.conftest import eventually

KEY = "a-key-of-the-tests"
ID = "8f2c4a1b9d0e"
HANDLER_WORKER = Path(__file__).with_name("handler_worker.py")
PROXY_WORKER = Path(__file__).with_name("proxy_worker.py")


class Site:
    """HTTP clients of an emulator with one service."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self.url = url

        def client(path: str, authorization: str) -> httpx.Client:
            headers = {"Authorization": authorization}
            return stack.enter_context(httpx.Client(base_url=url + path, headers=headers, timeout=60))

        self.root = client("", f"Bearer {KEY}")
        self.native = client(f"/v1/{ID}", f"Bearer {KEY}")
        self.openai = client("/v1", f"{ID}-{KEY}")

    def sync(self, script: dict[str, Any]) -> httpx.Response:
        return self.native.post("/sync", json={"input": script})

    def submit(self, script: dict[str, Any], webhook: str, **fields: Any) -> str:
        body = {"input": script, "webhook": webhook, **fields}
        task_id: str = self.native.post("/async", json=body).raise_for_status().json()["id"]
        return task_id

    def status(self, task_id: str) -> dict[str, Any]:
        document: dict[str, Any] = self.native.get("/status", params={"requestID": task_id}).json()
        return document

    def chat(self, text: str, model: str = "tiny", **fields: Any) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": text}], **fields}

    def state(self) -> dict[str, Any]:
        """Return the service's part of /state."""
        endpoint: dict[str, Any] = self.root.get("/state").raise_for_status().json()["endpoints"][0]
        return endpoint

    def idle_worker(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """Wait until a worker is idle; return it."""

        def poll() -> list[dict[str, Any]]:
            return [worker for worker in self.state()["workers"] if worker["state"] == "idle"]

        return eventually(poll, timeout_s)[0]

    def ended(self, count: int = 1, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """Wait until so many tasks have ended; return them, newest first."""

        def poll() -> list[dict[str, Any]]:
            tasks = [task for task in self.state()["jobs"] if task["endedAt"] is not None]
            return tasks if len(tasks) >= count else []

        return eventually(poll, timeout_s)

    def log(self) -> list[str]:
        """Return the log lines of all workers, also of those that have exited."""
        state = self.state()
        return [line for worker in (*state["workers"], *state["gone"]) for line in worker["log"]]

    def faults(self, *rules: dict[str, Any]) -> None:
        self.root.put("/faults", json={"rules": rules}).raise_for_status()


Start = Callable[..., Site]


@contextmanager
def site_with(worker: Path, **endpoint: Any) -> Iterator[Site]:
    defaults = {"id": ID, "command": [sys.executable, str(worker)], "workersMin": 1, "workersMax": 1, "grace": 0}
    document = {"port": 0, "apiKeys": [KEY], "endpoints": [{**defaults, **endpoint}]}
    with ExitStack() as stack:
        emulator = stack.enter_context(run_in_thread(SpiritEmulatorSettings.model_validate(document)))
        yield Site(emulator.url, stack)


@pytest.fixture
def start_handler() -> Iterator[Start]:
    """Return a function that starts an emulator with handler workers and these settings of its service."""
    with ExitStack() as stack:
        yield lambda **endpoint: stack.enter_context(site_with(HANDLER_WORKER, **endpoint))


@pytest.fixture
def start_proxy() -> Iterator[Start]:
    """The same with workers in proxy mode."""
    with ExitStack() as stack:
        yield lambda **endpoint: stack.enter_context(site_with(PROXY_WORKER, **endpoint))


class Webhook:
    """A client's server, which records what workers post."""

    def __init__(self) -> None:
        self.received: list[tuple[str, int, Any]] = []
        self.status = 200
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.received.append((query["requestID"][0], int(query["statusCode"][0]), json.loads(body)))
                self.send_response(webhook.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    hook = Webhook()
    thread = Thread(target=hook.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hook
    finally:
        hook.server.shutdown()
        thread.join()
        hook.server.server_close()
