"""Webhooks: up to three attempts, ten seconds apart."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from emulator.core.webhooks import Webhooks
from tests.unit.emulator.conftest import Site

URL = "http://client.example/hook"
DOCUMENT = {"id": "job", "status": "COMPLETED"}


class FakeWebhook:
    """A webhook with scripted statuses (None: connection refused), and a sleep that returns at once."""

    def __init__(self, *statuses: int | None) -> None:
        self.statuses = list(statuses)
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.slept: list[float] = []

    async def post(self, url: str, document: dict[str, Any]) -> int:
        self.received.append((url, document))
        status = self.statuses.pop(0)
        if status is None:
            raise httpx.ConnectError("connection refused")
        return status

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.mark.parametrize(
    ("statuses", "delays"),
    [
        ((200,), []),
        ((500, 200), [10.0]),
        ((None, 200), [10.0]),
        ((404, 302, 200), [10.0, 10.0]),
        ((204, None, 503), [10.0, 10.0]),
    ],
)
def test_a_webhook_is_called_up_to_three_times_until_it_returns_200(
    statuses: tuple[int | None, ...], delays: list[float]
) -> None:
    webhook = FakeWebhook(*statuses)
    asyncio.run(Webhooks(webhook.post, webhook.sleep).deliver(URL, DOCUMENT))
    assert webhook.received == [(URL, DOCUMENT)] * len(statuses)
    assert webhook.slept == delays


def test_an_invalid_url_is_logged_as_a_failed_attempt() -> None:
    class InvalidWebhook(FakeWebhook):
        async def post(self, url: str, document: dict[str, Any]) -> int:
            await super().post(url, document)
            raise httpx.InvalidURL("no host")

    webhook = InvalidWebhook(200, 200, 200)
    asyncio.run(Webhooks(webhook.post, webhook.sleep).deliver(URL, DOCUMENT))
    assert len(webhook.received) == 3


@pytest.mark.parametrize("output", ['{"text": "hi"}', '"half \\ud83d"', "[Infinity]"])
def test_a_webhook_receives_the_body_of_status(site: Site, output: str) -> None:
    received: list[Any] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        hook = threading.Thread(target=server.handle_request)
        hook.start()
        job_id = site.submit("x", webhook=f"http://127.0.0.1:{server.server_port}/hook")
        assert site.take() == {"id": job_id, "input": "x"}
        site.worker.post(f"/job-done/w1/{job_id}", content=f'{{"output": {output}}}').raise_for_status()
        hook.join(10)
    assert received == [site.status(job_id)]
