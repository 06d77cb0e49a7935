"""A real emulator on a free port, without worker processes: the test acts as the workers."""

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
from emulator.core.runpod_endpoint import RunPodEndpoint
from emulator.settings import EmulatorSettings, EndpointSettings

KEY = "a-key-of-the-tests"
# Avoids that every client loads the system's CA certificates, which is slow.
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
Start = Callable[..., "Site"]


class Site:
    """An emulator, and HTTP clients that act as a client and as a worker of its endpoint `ep`."""

    def __init__(self, emulator: Emulator, stack: ExitStack) -> None:
        self.emulator = emulator
        self.url = emulator.url
        self.tls = ssl.create_default_context(cafile=emulator.ca_file) if emulator.ca_file else None
        verify = self.tls or NO_CERTIFICATES

        def client(path: str, authorization: str) -> httpx.Client:
            headers = {"Authorization": authorization}
            return stack.enter_context(
                httpx.Client(base_url=self.url + path, headers=headers, timeout=20, verify=verify)
            )

        self.client = client("/v2/ep", f"Bearer {KEY}")
        self.root = client("", f"Bearer {KEY}")
        self.worker = client("/v2/ep", self.endpoint.worker_key)

    @property
    def endpoint(self) -> RunPodEndpoint:
        endpoint = self.emulator.endpoints["ep"]
        assert isinstance(endpoint, RunPodEndpoint)
        return endpoint

    def submit(self, job_input: Any = "hello", **fields: Any) -> str:
        job_id: str = self.client.post("/run", json={"input": job_input, **fields}).raise_for_status().json()["id"]
        return job_id

    def take(self, worker: str = "w1") -> Any:
        """Take the next job as this worker."""
        response = self.worker.get(f"/job-take/{worker}?gpu=x&job_in_progress=0").raise_for_status()
        return response.json() if response.content else None

    def stream(self, job_id: str, output: Any, worker: str = "w1") -> httpx.Response:
        return self.worker.post(f"/job-stream/{worker}/{job_id}?gpu=x&isStream=false", json={"output": output})

    def done(self, job_id: str, worker: str = "w1", **body: Any) -> httpx.Response:
        return self.worker.post(f"/job-done/{worker}/{job_id}?gpu=x&isStream=false", json=body)

    def put_faults(self, *rules: dict[str, Any], **settings: Any) -> httpx.Response:
        return self.root.put("/faults", json={"rules": rules, **settings})

    def status(self, job_id: str) -> dict[str, Any]:
        document: dict[str, Any] = self.client.get(f"/status/{job_id}").raise_for_status().json()
        return document


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until the condition is true; fail the test after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"condition not met within {timeout_s} s")
        time.sleep(0.01)


def disconnect_when(
    condition: Callable[[], object], client: httpx.Client, method: str, path: str, document: Any = None
) -> None:
    """Send a request as this client would, and close the connection as soon as the condition is true."""
    request = client.build_request(method, path, json=document)
    connection = http.client.HTTPConnection(request.url.host, request.url.port, timeout=10)
    connection.request(method, request.url.raw_path.decode(), request.content, dict(request.headers))
    wait_until(condition)
    connection.close()


def emulator_with(*endpoints: dict[str, Any], tls: bool = False) -> AbstractContextManager[Emulator]:
    document = {"port": 0, "tls": tls, "apiKeys": [KEY], "endpoints": list(endpoints)}
    return run_in_thread(EmulatorSettings.model_validate(document))


@pytest.fixture(scope="session")
def shared_emulator() -> Iterator[Emulator]:
    """Share an emulator between tests, since a server is slow to start; each test replaces its endpoint."""
    with emulator_with({"id": "ep"}) as emulator:
        yield emulator


@pytest.fixture
def start(shared_emulator: Emulator) -> Iterator[Start]:
    """Return a function that sets up the endpoint `ep` with these settings; with other endpoints, in a new emulator."""
    with ExitStack() as stack:

        def begin(other_endpoints: tuple[dict[str, Any], ...] = (), **settings: Any) -> Site:
            endpoint = {"id": "ep", "longPoll": 0.3, **settings}
            if other_endpoints:
                return Site(stack.enter_context(emulator_with(endpoint, *other_endpoints)), stack)
            shared_emulator.faults.set(FaultSettings())
            new_endpoint = shared_emulator._create_endpoint(
                EndpointSettings.model_validate(endpoint), shared_emulator._surroundings
            )
            shared_emulator.endpoints["ep"] = new_endpoint
            return Site(shared_emulator, stack)

        yield begin


@pytest.fixture
def site(start: Start) -> Site:
    return start()
