"""A real emulator of Spirit on a free port, without worker processes: the test acts as the worker of an agent."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from emulator.app import Emulator, run_in_thread
from emulator.spirit.endpoint import SpiritEndpoint
from emulator.spirit.settings import SpiritEmulatorSettings
from tests.unit.emulator.conftest import KEY, NO_CERTIFICATES

ID = "8f2c4a1b9d0e"


class SpiritSite:
    """An emulator, and HTTP clients that act as a client and as the worker of its first agent."""

    def __init__(self, emulator: Emulator, stack: ExitStack) -> None:
        self.emulator = emulator
        endpoint = emulator.endpoints[ID]
        assert isinstance(endpoint, SpiritEndpoint)
        self.endpoint = endpoint
        self.agents = list(emulator.agents.urls(ID).values())

        def client(url: str, authorization: str) -> httpx.Client:
            headers = {"Authorization": authorization} if authorization else {}
            return stack.enter_context(
                httpx.Client(base_url=url, headers=headers, timeout=20, verify=NO_CERTIFICATES, trust_env=False)
            )

        self.root = client(emulator.url, f"Bearer {KEY}")
        self.native = client(f"{emulator.url}/v1/{ID}", f"Bearer {KEY}")
        self.proxied = client(emulator.url, f"{ID}-{KEY}")
        self.agent = client(f"{(self.agents or ['http://127.0.0.1:1'])[0]}/apis/v1", "")

    def take(self) -> dict[str, Any] | None:
        """Take the next task as the worker; return its headers and its parsed body."""
        response = self.agent.get("/request")
        if response.status_code == 404:
            return None
        task = response.raise_for_status().json()
        return {"id": task["headers"]["Ease-Request-Id"], **task, "parsed": json.loads(base64.b64decode(task["body"]))}

    def taken(self) -> dict[str, Any]:
        """Wait for a task and take it."""
        for _ in range(500):
            if task := self.take():
                return task
        pytest.fail("no task")

    def result(self, task_id: str, data: bytes, status: int = 200, message: str = "") -> httpx.Response:
        body = {"statusCode": status, "message": message, "data": base64.b64encode(data).decode()}
        return self.agent.post(f"/request-result/{task_id}", content=json.dumps(body))

    def metric(self, task_id: str, status: str, message: str = "") -> httpx.Response:
        return self.agent.post(f"/request-metric/{task_id}", content=json.dumps({"status": status, "message": message}))

    def ack(self, task_id: str) -> httpx.Response:
        return self.agent.post(f"/request-ack/{task_id}")

    def put_faults(self, *rules: dict[str, Any]) -> httpx.Response:
        return self.root.put("/faults", json={"rules": rules})

    def submit(self, **fields: Any) -> str:
        body = {"input": 1, "webhook": "http://127.0.0.1:1/hook", **fields}
        task_id: str = self.native.post("/async", json=body).raise_for_status().json()["id"]
        return task_id


Start = Callable[..., SpiritSite]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts an emulator whose service has these settings, and one agent."""
    with ExitStack() as stack:

        def begin(**settings: Any) -> SpiritSite:
            endpoint = {"id": ID, "agentPorts": [0], **settings}
            document = {"port": 0, "apiKeys": [KEY], "endpoints": [endpoint]}
            emulator = stack.enter_context(run_in_thread(SpiritEmulatorSettings.model_validate(document)))
            return SpiritSite(emulator, stack)

        yield begin


@pytest.fixture
def site(start: Start) -> SpiritSite:
    return start()
