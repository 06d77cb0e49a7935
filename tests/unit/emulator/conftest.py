"""A real emulator on a free port of the loopback, without processes: the test plays the workers."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import httpx
import pytest

from emulator.app import Emulator, run_in_thread
from emulator.core.faults import FaultSettings
from emulator.settings import EmulatorSettings, EndpointSettings

KEY = "a-key-of-the-tests"
# Without a context of our own, each client would load all certificates of this machine.
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
Start = Callable[..., "Site"]


class Site:
    """An emulator, a client of its APIs, and a worker of its endpoint `ep`."""

    def __init__(self, emulator: Emulator, stack: ExitStack) -> None:
        self.emulator = emulator
        self.url = emulator.url
        self.tls = ssl.create_default_context(cafile=emulator.ca_file) if emulator.ca_file else None
        verify = self.tls or NO_CERTIFICATES

        def client(path: str, authorization: str) -> httpx.Client:
            headers = {"Authorization": authorization}
            made = httpx.Client(base_url=self.url + path, headers=headers, timeout=20, verify=verify)
            return stack.enter_context(made)

        self.client = client("/v2/ep", f"Bearer {KEY}")
        self.root = client("", f"Bearer {KEY}")
        self.worker = client("/v2/ep", emulator.endpoints["ep"].worker_key)

    def submit(self, job_input: Any = "hello", **fields: Any) -> str:
        job_id: str = self.client.post("/run", json={"input": job_input, **fields}).raise_for_status().json()["id"]
        return job_id

    def take(self, worker: str = "w1") -> Any:
        """The next job, for a worker of this name."""
        answer = self.worker.get(f"/job-take/{worker}?gpu=x&job_in_progress=0").raise_for_status()
        return answer.json() if answer.content else None

    def stream(self, job_id: str, output: Any, worker: str = "w1") -> httpx.Response:
        return self.worker.post(f"/job-stream/{worker}/{job_id}?gpu=x&isStream=false", json={"output": output})

    def done(self, job_id: str, worker: str = "w1", **body: Any) -> httpx.Response:
        return self.worker.post(f"/job-done/{worker}/{job_id}?gpu=x&isStream=false", json=body)

    def status(self, job_id: str) -> dict[str, Any]:
        document: dict[str, Any] = self.client.get(f"/status/{job_id}").raise_for_status().json()
        return document


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until the condition holds; a failed test if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"it is not so within {timeout_s} s")
        time.sleep(0.01)


def hang_up(via: httpx.Client, method: str, path: str, once: Callable[[], object], document: Any = None) -> None:
    """Send what this client would, and hang up without an answer as soon as it is so."""
    request = via.build_request(method, path, json=document)
    connection = http.client.HTTPConnection(request.url.host, request.url.port, timeout=10)
    connection.request(method, request.url.raw_path.decode(), request.content, dict(request.headers))
    until(once)
    connection.close()


def emulator_with(*endpoints: dict[str, Any], tls: bool = False) -> AbstractContextManager[Emulator]:
    document = {"port": 0, "tls": tls, "apiKeys": [KEY], "endpoints": list(endpoints)}
    return run_in_thread(EmulatorSettings.model_validate(document))


@pytest.fixture(scope="session")
def shared() -> Iterator[Emulator]:
    """An emulator for many tests, each of which gives it an endpoint of its own: a server takes longer to start."""
    with emulator_with({"id": "ep"}) as emulator:
        yield emulator


@pytest.fixture
def start(shared: Emulator) -> Iterator[Start]:
    """Start with these settings for the endpoint `ep`; where there are more endpoints, in an emulator of its own."""
    with ExitStack() as stack:

        def begin(more: tuple[dict[str, Any], ...] = (), **settings: Any) -> Site:
            endpoint = {"id": "ep", "longPoll": 0.3, **settings}
            if more:
                return Site(stack.enter_context(emulator_with(endpoint, *more)), stack)
            shared.faults.set(FaultSettings())
            shared.endpoints["ep"] = shared._create_endpoint(EndpointSettings.model_validate(endpoint))
            return Site(shared, stack)

        yield begin


@pytest.fixture
def site(start: Start) -> Site:
    return start()
