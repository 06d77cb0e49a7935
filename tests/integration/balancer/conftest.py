"""Emulators with a load-balancing endpoint whose workers are processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import openai
import pytest

from emulator.app import run_in_thread
from emulator.balancer.endpoint import BalancerEndpoint
from emulator.settings import EmulatorSettings
from tests.integration.emulator.conftest import KEY, LLM_START_S, REPOSITORY, eventually


class Site:
    """A load-balancing endpoint, and a client of it."""

    def __init__(
        self, endpoint: BalancerEndpoint, client: httpx.Client, root: httpx.Client, state: Callable[[], dict[str, Any]]
    ) -> None:
        self.url = endpoint.url
        self.client = client
        self.root = root
        """Calls the emulator's own routes."""
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

    def freeze(self, worker: str, *, drops_connections: bool = True) -> None:
        """Freeze a worker with all its processes, until `thaw`."""
        options = {"dropConnections": drops_connections}
        self.root.post(f"/workers/{worker}/freeze", json=options).raise_for_status()

    def thaw(self, worker: str) -> None:
        self.root.post(f"/workers/{worker}/thaw").raise_for_status()

    def lines_with(self, text: str) -> list[str]:
        """Return the lines of the workers' logs that have a text in them."""
        return [line for worker in self.state()["workers"] for line in worker["log"] if text in line]

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
    with run_in_thread(document) as emulator, httpx.Client(headers=headers, timeout=60) as root:
        root.base_url = httpx.URL(emulator.url)
        balanced = emulator.endpoints["lb"]
        assert isinstance(balanced, BalancerEndpoint)

        def state() -> dict[str, Any]:
            document: dict[str, Any] = root.get("/state").json()["endpoints"][0]
            return document

        with httpx.Client(base_url=balanced.url, headers=headers, timeout=60) as client:
            yield Site(balanced, client, root, state)


@contextmanager
def served_by_worker(variables: dict[str, str]) -> Iterator[Site]:
    """Run a worker as it is (`python handler.py`) with these variables, until it is ready."""
    command = [sys.executable, "handler.py"]
    with balancer_with(command=command, env=variables, workersMin=1, workersMax=1, initTimeout=LLM_START_S) as started:
        started.idle_workers(1, LLM_START_S)
        yield started


@contextmanager
def openai_client(site: Site) -> Iterator[openai.OpenAI]:
    """Yield the official client of the endpoint, which tries nothing again."""
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def start() -> Iterator[Callable[..., Site]]:
    """Return a function that starts an emulator with these settings of its endpoint."""
    with ExitStack() as stack:
        yield lambda **endpoint: stack.enter_context(balancer_with(**endpoint))
