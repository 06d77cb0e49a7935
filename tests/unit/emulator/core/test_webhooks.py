"""Webhooks: one try and two more, ten seconds apart."""

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


class Client:
    """A webhook that answers as it is told, and time that passes at once."""

    def __init__(self, *answers: int | None) -> None:
        self.answers = list(answers)
        self.got: list[tuple[str, dict[str, Any]]] = []
        self.slept: list[float] = []

    async def post(self, url: str, document: dict[str, Any]) -> int:
        self.got.append((url, document))
        answer = self.answers.pop(0)
        if answer is None:
            raise httpx.ConnectError("nobody is there")
        return answer

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.mark.parametrize(
    ("answers", "pauses"),
    [
        ((200,), []),
        ((500, 200), [10.0]),
        ((None, 200), [10.0]),
        ((404, 302, 200), [10.0, 10.0]),
        ((204, None, 503), [10.0, 10.0]),
    ],
)
def test_a_webhook_is_called_until_it_answers_200_three_times_at_most(
    answers: tuple[int | None, ...], pauses: list[float]
) -> None:
    client = Client(*answers)
    asyncio.run(Webhooks(client.post, client.sleep).deliver(URL, DOCUMENT))
    assert client.got == [(URL, DOCUMENT)] * len(answers)
    assert client.slept == pauses


def test_a_webhook_gets_the_body_of_status(site: Site) -> None:
    got: list[Any] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        hook = threading.Thread(target=server.handle_request)
        hook.start()
        job_id = site.submit("x", webhook=f"http://127.0.0.1:{server.server_port}/hook")
        assert site.take() == {"id": job_id, "input": "x"}
        site.done(job_id, output={"text": "hi"})
        hook.join(10)
    assert got == [site.status(job_id)]
