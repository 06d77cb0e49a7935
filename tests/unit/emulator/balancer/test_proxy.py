"""A load-balancing endpoint over real HTTP; its workers are servers of the test, whose health and answers it sets."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web

from emulator.app import Emulator, run_in_thread
from emulator.balancer.endpoint import BalancerEndpoint
from emulator.core.faults import FaultSettings
from emulator.core.process import ProcessListener
from emulator.settings import BalancerSettings, EmulatorSettings
from tests.unit.emulator.conftest import KEY, NO_CERTIFICATES, wait_until

Start = Callable[..., "Site"]


@dataclass(eq=False)
class Server:
    """A worker's "process": an HTTP server in the emulator's event loop."""

    command: Sequence[str]
    env: Mapping[str, str]
    cwd: str | None
    listener: ProcessListener
    pid: int | None = 1
    health: int = 200
    requests: list[str] = field(default_factory=list)
    let_go: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._serve())

    @property
    def id(self) -> str:
        return self.env["RUNPOD_POD_ID"]

    async def _serve(self) -> None:
        app = web.Application(client_max_size=0)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
        await runner.setup()
        try:
            for port in (self.env["PORT"], self.env["PORT_HEALTH"]):
                await web.TCPSite(runner, "127.0.0.1", int(port)).start()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()
            self.listener.on_exit(0)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/ping" and request.transport is not None:
            (_, port) = request.transport.get_extra_info("sockname")[:2]
            if port == int(self.env["PORT_HEALTH"]):
                return web.Response(status=self.health)
        self.requests.append(f"{request.method} {request.path_qs}")
        if request.path == "/ws":
            answer = web.WebSocketResponse()
            await answer.prepare(request)
            async for message in answer:
                await answer.send_str(f"{message.data}!")
            return answer
        if request.path == "/echo":
            headers = {
                "x-type": request.headers.get("content-type", ""),
                "x-key": str("Authorization" in request.headers),
            }
            return web.Response(body=await request.read(), headers=headers, status=201)
        if request.path == "/break":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if request.path == "/large":
            return web.Response(body=b"x" * 2000)
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            await response.write(b"first")
            while not self.let_go.is_set():  # noqa: ASYNC110 (the test sets it in another thread)
                await asyncio.sleep(0.01)
            await response.write(b"second")
        except (ConnectionResetError, asyncio.CancelledError):
            self.gone.set()
            raise
        return response

    def terminate(self) -> None:
        self._task.cancel()

    def kill(self) -> None:
        self._task.cancel()


class Site:
    """An endpoint and a client of it."""

    def __init__(self, emulator: Emulator, endpoint: BalancerEndpoint, stack: ExitStack, servers: list[Server]) -> None:
        self.emulator, self.endpoint, self.servers = emulator, endpoint, servers
        headers = {"Authorization": f"Bearer {KEY}"}
        ca_file = emulator.ca_file
        verify = NO_CERTIFICATES if ca_file is None else ssl.create_default_context(cafile=ca_file)
        self.client = stack.enter_context(
            httpx.Client(base_url=endpoint.url, headers=headers, timeout=20, verify=verify)
        )

    def healthy(self, count: int) -> None:
        wait_until(lambda: len(self.endpoint.healthy_workers()) == count)

    def server(self, worker: str) -> Server:
        (server,) = [one for one in self.servers if one.id == worker]
        return server


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Return a function that starts an emulator with a load-balancing endpoint `lb`."""
    servers: list[Server] = []

    def process(*arguments: Any) -> Server:
        servers.append(Server(*arguments))
        return servers[-1]

    monkeypatch.setattr("emulator.app.WorkerProcess", process)
    with ExitStack() as stack:

        def begin(**settings: Any) -> Site:
            document = {"id": "lb", "type": "LOAD_BALANCER", "command": "x", "workersMin": 1, **settings}
            server = {"port": 0, "apiKeys": [KEY], "tls": document.pop("tls", False)}
            endpoints = [{"healthInterval": 0.02, **document}]
            emulator_settings = EmulatorSettings.model_validate({**server, "endpoints": endpoints})
            emulator = stack.enter_context(run_in_thread(emulator_settings))
            endpoint = emulator.endpoints["lb"]
            assert isinstance(endpoint, BalancerEndpoint)
            return Site(emulator, endpoint, stack, servers)

        yield begin


@pytest.fixture
def site(start: Start) -> Site:
    site = start()
    site.healthy(1)
    return site


def test_a_request_reaches_a_worker_as_it_was_sent(site: Site) -> None:
    body = b"\x00\xff" * 100_000

    response = site.client.put("/echo?a=%2F&b", content=body, headers={"content-type": "audio/wav"})

    (worker,) = site.endpoint.healthy_workers()
    assert (response.status_code, response.content) == (201, body)
    assert (response.headers["x-type"], response.headers["x-key"]) == ("audio/wav", "False")
    assert response.headers["x-runpod-worker-id"] == worker.id
    assert site.server(worker.id).requests == ["PUT /echo?a=%2F&b"]


def test_with_tls_the_endpoints_own_url_has_it_too(start: Start) -> None:
    site = start(tls=True)
    site.healthy(1)
    assert site.endpoint.url.startswith("https://")
    with site.client.stream("POST", "/stream", json={}) as response:
        site.servers[0].let_go.set()
        assert response.read() == b"firstsecond"


def test_the_api_key_is_required(site: Site) -> None:
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        assert site.client.get("/ping", headers=headers).status_code == 401


def test_a_response_streams_as_it_comes(site: Site) -> None:
    with site.client.stream("POST", "/stream", json={}) as response:
        chunks = response.iter_raw()
        first = next(chunks)
        site.servers[0].let_go.set()
        assert (first, b"".join(chunks)) == (b"first", b"second")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_client_that_leaves_ends_its_request_at_the_worker(site: Site, method: str) -> None:
    with site.client.stream(method, "/stream", content=b"{}" if method == "POST" else None) as response:
        next(response.iter_raw())
    assert site.servers[0].gone.wait(10)
    wait_until(lambda: site.endpoint.queue.in_progress == 0)
    assert site.endpoint.queue.recent(1)[0].status == "CANCELLED"


def test_a_client_that_leaves_in_mid_upload_has_cancelled_its_request(site: Site) -> None:
    url = httpx.URL(site.endpoint.url)
    with socket.create_connection((url.host, url.port or 0)) as client:
        head = f"POST /echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n\r\nhalf"
        client.sendall(head.encode())
        wait_until(lambda: site.servers[0].requests)
    wait_until(lambda: site.endpoint.queue.in_progress == 0)
    assert site.endpoint.queue.recent(1)[0].status == "CANCELLED"


def test_the_balancer_prefers_the_worker_with_fewer_requests_and_uses_idle_ones_in_turn(start: Start) -> None:
    site = start(workersMin=2)
    site.healthy(2)
    used = [site.client.get("/echo").headers["x-runpod-worker-id"] for _ in range(4)]
    assert used[0] != used[1]
    assert used[:2] == used[2:]
    with site.client.stream("POST", "/stream", json={}) as response:
        busy = response.headers["x-runpod-worker-id"]
        others = {site.client.get("/echo").headers["x-runpod-worker-id"] for _ in range(3)}
        site.server(busy).let_go.set()
        response.read()
    assert others == set(used) - {busy}


@pytest.mark.parametrize("status", [204, 503])
def test_a_worker_that_is_not_healthy_gets_nothing_new(start: Start, status: int) -> None:
    site = start(workersMin=2)
    site.healthy(2)
    ill = site.endpoint.healthy_workers()[0].id
    site.server(ill).health = status
    site.healthy(1)
    assert ill not in {site.client.get("/echo").headers["x-runpod-worker-id"] for _ in range(4)}
    site.server(ill).health = 200
    site.healthy(2)


def test_a_cold_start_is_timed_from_the_first_204_to_the_first_200(start: Start) -> None:
    site = start(workersMin=0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(site.client.get, "/echo")
        wait_until(lambda: site.servers)
        site.servers[0].health = 204
        wait_until(lambda: any(one.initializing_at for one in site.endpoint.workers.values()))
        assert site.endpoint.fleet.health()["initializing"] == 1
        site.servers[0].health = 200
        assert waiting.result(20).status_code == 201
    assert any("healthy: cold start 0." in event["text"] for event in site.endpoint.events)


def test_a_request_without_a_worker_gets_400_in_the_documented_time(start: Start) -> None:
    site = start(workersMin=0, workersMax=0, noWorker=0.1)
    begun = time.monotonic()
    response = site.client.post("/v1/completions", json={})
    assert (response.status_code, response.json()) == (400, {"error": "no workers available for 0.1 s"})
    assert time.monotonic() - begun >= 0.1


def test_affinity_is_a_preference_unless_it_is_strict(start: Start) -> None:
    site = start(workersMin=2, affinityWait=0.1)
    site.healthy(2)
    wanted = site.endpoint.healthy_workers()[0].id

    def served(value: str) -> httpx.Response:
        return site.client.get("/echo", headers={"X-Runpod-Worker-Id": value})

    for value in (wanted, f"strict {wanted}", f"strict-resume {wanted}"):
        assert {served(value).headers["x-runpod-worker-id"] for _ in range(3)} == {wanted}
    site.server(wanted).health = 503
    site.healthy(1)
    assert served(wanted).headers["x-runpod-worker-id"] != wanted
    late = served(f"strict {wanted}")
    assert (late.status_code, late.json()) == (400, {"error": "worker_timeout: timed out waiting for worker"})
    gone = served("strict nobody")
    assert (gone.status_code, gone.json()) == (404, {"error": "affinity_worker_gone"})


def test_the_documented_limits_apply(start: Start) -> None:
    site = start(maxBody=1000, requestTimeout=0.3)
    site.healthy(1)
    assert site.client.post("/echo", content=b"x" * 1001).status_code == 413
    assert site.client.post("/echo", content=iter([b"x" * 600, b"x" * 600])).status_code == 413
    with pytest.raises(httpx.RemoteProtocolError):
        site.client.get("/large")
    with pytest.raises(httpx.RemoteProtocolError):  # Its response has begun.
        site.client.post("/stream", json={})
    assert site.servers[0].gone.wait(10)
    settings = BalancerSettings()
    assert (settings.no_worker_s, settings.request_timeout_s, settings.max_body_bytes) == (120, 330, 30 * 2**20)


def test_a_worker_that_breaks_the_connection_gets_502_for_its_request_and_it_is_not_sent_again(site: Site) -> None:
    assert site.client.post("/break", json={}).status_code == 502
    assert site.servers[0].requests == ["POST /break"]


def test_a_request_counts_for_the_autoscaler_while_it_runs(start: Start) -> None:
    site = start(workersMax=2, scalerValue=1)
    site.healthy(1)
    with site.client.stream("POST", "/stream", json={}), ThreadPoolExecutor(1) as pool:
        second = pool.submit(site.client.post, "/stream", json={})
        site.healthy(2)
        for server in site.servers:
            server.let_go.set()
        second.result(20)


def test_faults_hit_requests_and_health_checks(site: Site) -> None:
    rules: list[dict[str, Any]] = [{"kind": "error", "route": "balancer", "status": 500, "times": 1}]
    site.emulator.faults.set(FaultSettings.model_validate({"rules": rules}))
    assert [site.client.get("/echo").status_code for _ in range(2)] == [500, 201]
    rules = [{"kind": "error", "route": "health-check"}]
    site.emulator.faults.set(FaultSettings.model_validate({"rules": rules}))
    site.healthy(0)
    site.emulator.faults.set(FaultSettings())
    site.healthy(1)


def test_the_emulators_own_port_serves_the_endpoint_for_the_page(site: Site) -> None:
    path = site.endpoint.page_document()["openaiPath"]
    assert path == "/balancer/lb/v1"
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(
        f"{site.emulator.url}/balancer/lb/echo", content=b"x", headers=headers, verify=NO_CERTIFICATES
    )
    assert response.content == b"x"


def test_a_websocket_is_relayed_both_ways(site: Site) -> None:
    async def talk() -> tuple[str, str]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.ws_connect(f"{site.endpoint.url}/ws") as socket,
        ):
            await socket.send_str("a")
            first = await socket.receive_str()
            await socket.send_str("b")
            return first, await socket.receive_str()

    assert asyncio.run(talk()) == ("a!", "b!")
    wait_until(lambda: site.endpoint.queue.in_progress == 0)


def test_a_websocket_that_its_worker_refuses_is_refused_with_its_status(site: Site) -> None:
    async def talk() -> None:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
            await session.ws_connect(f"{site.endpoint.url}/echo")

    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        asyncio.run(talk())
    assert refused.value.status == 201
