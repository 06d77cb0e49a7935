"""Emulators with a load-balancing endpoint whose workers are processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from emulator.app import run_in_thread
from emulator.balancer.endpoint import BalancerEndpoint
from emulator.settings import EmulatorSettings
from tests.integration.emulator.conftest import KEY, REPOSITORY, eventually


class Site:
    """A load-balancing endpoint, and a client of it."""

    def __init__(self, endpoint: BalancerEndpoint, client: httpx.Client, state: Callable[[], dict[str, Any]]) -> None:
        self.url = endpoint.url
        self.client = client
        self.state = state
        """Returns the endpoint's part of /state."""

    def workers(self, *states: str) -> list[dict[str, Any]]:
        return [worker for worker in self.state()["workers"] if worker["state"] in states]

    def idle_workers(self, count: int, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """Wait until so many workers are idle; return them."""

        def poll() -> list[dict[str, Any]]:
            idle = self.workers("idle")
            return idle if len(idle) == count else []

        return eventually(poll, timeout_s)

    def exited(self, worker: str) -> int:
        """Wait until a worker has exited; return its exit status."""

        def poll() -> list[int]:
            state = self.state()
            workers = [one for one in (*state["gone"], *state["workers"]) if one["id"] == worker]
            return [one["exitCode"] for one in workers if one["exitCode"] is not None]

        return eventually(poll)[0]


@contextmanager
def balancer_with(**endpoint: Any) -> Iterator[Site]:
    """Run an emulator with this endpoint; its workers are scripted ones by default."""
    settings = {
        "id": "lb",
        "type": "LOAD_BALANCER",
        "command": [sys.executable, "-m", "tests.scripted_worker"],
        "cwd": str(REPOSITORY),
        "healthInterval": 0.2,
        "grace": 30,
        **endpoint,
    }
    document = EmulatorSettings.model_validate({"port": 0, "apiKeys": [KEY], "endpoints": [settings]})
    headers = {"Authorization": f"Bearer {KEY}"}
    with run_in_thread(document) as emulator, httpx.Client(timeout=60) as plain:
        balanced = emulator.endpoints["lb"]
        assert isinstance(balanced, BalancerEndpoint)

        def state() -> dict[str, Any]:
            document: dict[str, Any] = plain.get(f"{emulator.url}/state").json()["endpoints"][0]
            return document

        with httpx.Client(base_url=balanced.url, headers=headers, timeout=60) as client:
            yield Site(balanced, client, state)


@pytest.fixture
def start() -> Iterator[Callable[..., Site]]:
    """Return a function that starts an emulator with these settings of its endpoint."""
    with ExitStack() as stack:
        yield lambda **endpoint: stack.enter_context(balancer_with(**endpoint))
