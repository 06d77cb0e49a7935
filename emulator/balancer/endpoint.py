"""One load-balancing endpoint: its URL, its workers with their health, its requests."""

from __future__ import annotations

import asyncio
import socket
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from weakref import WeakSet

import aiohttp

from emulator.api.ports import HOST, Ports
from emulator.balancer.affinity import Affinity
from emulator.balancer.requests import WORKERS_TOPIC, BalancedRequest, Requests
from emulator.core.endpoint import Endpoint, Surroundings
from emulator.core.faults import FaultKind
from emulator.core.long_poll import Disconnect
from emulator.errors import AffinityWorkerGoneError, BadRequestError, NoWorkerError, SettingsError
from emulator.free_port import free_port
from emulator.settings import BalancerSettings

_HEALTH_TIMEOUT_S = 5.0


@dataclass(eq=False)
class BalancedWorker:
    """A worker as the balancer sees it.

    Args:
        id: the worker's.
        port: `PORT`, of its server.
        port_health: `PORT_HEALTH`, of its health check.
        status: of its last health check; 0 if it has not answered.
        initializing_at: when it first answered 204.
        checking: checks its health until it exits.
    """

    id: str
    port: int
    port_health: int
    status: int = 0
    initializing_at: float | None = None
    checking: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """URL of its server."""
        return f"http://{HOST}:{self.port}"

    @property
    def health_url(self) -> str:
        """URL of its health check's server."""
        return f"http://{HOST}:{self.port_health}"


class BalancerEndpoint(Endpoint):
    """A load-balancing endpoint as its clients see it.

    Args:
        settings: settings of the endpoint.
        surroundings: what all endpoints share.
        ports: the URLs' ports.
        base_url: URL of the emulator, whose scheme and host the endpoint's own URL has.

    Raises:
        SettingsError: its port is not available.
    """

    settings: BalancerSettings
    queue: Requests

    def __init__(self, settings: BalancerSettings, surroundings: Surroundings, *, ports: Ports, base_url: str) -> None:
        super().__init__(settings, surroundings)
        self.queue = Requests(surroundings.clock, self.on_change)
        self.workers: dict[str, BalancedWorker] = {}
        self._ports = ports
        self._session: aiohttp.ClientSession | None = None
        # Of the session's connections, by the worker's port.
        self._sockets: defaultdict[int, WeakSet[socket.socket]] = defaultdict(WeakSet)
        self.fleet = self._create_fleet(self._environment, surroundings.redaction)
        try:
            port = ports.open(settings.id, port=settings.port)
        except OSError as error:
            raise SettingsError(
                f"endpoint {settings.id} cannot listen on port {settings.port}: {error.strerror}"
            ) from None
        self.url = f"{base_url.rpartition(':')[0]}:{port}"
        """The endpoint's own URL, in place of `https://ID.api.runpod.ai`."""

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections to workers; to be used in the emulator's event loop."""
        if self._session is None:
            # What a response is encoded in is the client's business, and so are redirects and cookies.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, socket_factory=self._open_socket),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_HEALTH_TIMEOUT_S),
            )
        return self._session

    async def choose_worker(self, affinity: Affinity, disconnect: Disconnect) -> BalancedWorker | None:
        """Return the worker that gets a request now, as soon as one is healthy; None if the client has gone.

        Raises:
            NoWorkerError: none was available in time.
            BadRequestError: the only worker that the request may have did not become available in time.
            AffinityWorkerGoneError: that worker is gone.
        """
        settings = self.settings

        def poll() -> BalancedWorker | None:
            if self.queue.is_closed:
                raise NoWorkerError("no workers available: the emulator is shutting down")
            healthy = self.healthy_workers()
            preferred = [worker for worker in healthy if worker.id == affinity.worker]
            if affinity.is_strict and affinity.worker not in self.workers:
                raise AffinityWorkerGoneError("affinity_worker_gone")
            candidates = preferred if preferred or affinity.is_strict else healthy
            taken = {one.id: one.jobs_taken for one in self.fleet.workers()}
            return min(candidates, key=lambda one: (len(self.queue.running_jobs(one.id)), taken[one.id]), default=None)

        wait_s = settings.affinity_wait_s if affinity.is_strict else settings.no_worker_s
        worker = await self.long_poll.wait_for(WORKERS_TOPIC, poll, wait_s, disconnect)
        if worker is None and not disconnect.done():
            if affinity.is_strict:
                raise BadRequestError("worker_timeout: timed out waiting for worker")
            raise NoWorkerError(f"no workers available for {wait_s:g} s")
        for one in self.fleet.workers():
            one.jobs_taken += worker is not None and one.id == worker.id
        return worker

    def count_output(self, request: BalancedRequest, worker: str) -> None:
        """Record a piece of a response's body, which a worker has sent."""
        self.queue.count_output(request)
        self.fleet.on_answer(worker)

    def healthy_workers(self) -> list[BalancedWorker]:
        """Return the workers that get requests, in order of their start."""
        return [
            self.workers[worker.id]
            for worker in self.fleet.workers()
            if worker.takes_jobs and worker.id in self.workers and self.workers[worker.id].status == HTTPStatus.OK
        ]

    def request_urls(self) -> dict[str, str]:
        """Return the URLs that clients call, by the names of the API."""
        return {"base": self.url, "health": self.url + self.settings.health_check_path}

    def page_document(self) -> dict[str, str | None]:
        """Return how the page reaches the endpoint: on the emulator's own port, as a page reaches no other."""
        return {
            "openaiPath": f"/balancer/{self.settings.id}/v1",
            "authorization": "Bearer {key}",
            "cancelPath": None,
            "url": self.url,
        }

    def forget_duplicates(self) -> None:
        """Do nothing: no request is given out twice."""

    def on_worker_stopping(self, worker: str) -> None:
        """Do nothing: it gets no requests from now on."""

    def on_worker_frozen(self, worker: str, *, drops_connections: bool) -> None:
        """Check its health no more, so that it gets no requests until it is thawed; close the connections to it."""
        if (frozen := self.workers.get(worker)) is not None:
            frozen.status = 0
            self._stop_checking(frozen)
            if drops_connections:
                self._drop_connections(frozen)

    def on_worker_thawed(self, worker: str) -> None:
        """Check its health from now on."""
        if (thawed := self.workers.get(worker)) is not None:
            self._begin_checking(thawed)

    def on_worker_exited(self, worker: str) -> None:
        """Check its health no more, and let requests that wait for it know."""
        if (exited := self.workers.pop(worker, None)) is not None:
            self._stop_checking(exited)
            for port in (exited.port, exited.port_health):
                self._sockets.pop(port, None)
        self.long_poll.notify(WORKERS_TOPIC)

    async def close(self) -> None:
        """Close the endpoint's port and the connections to workers, which have exited."""
        self._ports.close(self.settings.id)
        for worker in list(self.workers):
            self.on_worker_exited(worker)
        if self._session is not None:
            await self._session.close()

    def _environment(self, worker: str) -> Mapping[str, str]:
        """Return the variables of a worker on free ports, whose health is checked from now on."""
        balanced = self.workers[worker] = BalancedWorker(worker, free_port(), free_port())
        self._begin_checking(balanced)
        return {
            "PORT": str(balanced.port),
            "PORT_HEALTH": str(balanced.port_health),
            # On the platform, a worker listens on all addresses of its container.
            "LISTEN_HOST": HOST,
            "RUNPOD_ENDPOINT_ID": self.settings.id,
            "RUNPOD_POD_ID": worker,
            "RUNPOD_POD_HOSTNAME": worker,
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "PYTHONUNBUFFERED": "1",
        }

    def _begin_checking(self, worker: BalancedWorker) -> None:
        worker.checking = asyncio.create_task(self._check_health(worker), name=f"health of {worker.id}")

    def _stop_checking(self, worker: BalancedWorker) -> None:
        if worker.checking is not None:
            worker.checking.cancel()

    def _open_socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        opened = socket.socket(*address[:3])
        self._sockets[address[4][1]].add(opened)
        return opened

    def _drop_connections(self, worker: BalancedWorker) -> None:
        """End the connections to a worker; requests on them fail. Closing the session leaves them waiting for ever."""
        for port in (worker.port, worker.port_health):
            for opened in self._sockets.pop(port, ()):
                with suppress(OSError):  # It is closed already.
                    opened.shutdown(socket.SHUT_RDWR)

    async def _check_health(self, worker: BalancedWorker) -> None:
        while True:
            self._on_health(worker, await self._health(worker))
            await asyncio.sleep(self.settings.health_interval_s)

    async def _health(self, worker: BalancedWorker) -> int:
        """Return the status of a health check; 0 without an answer."""
        for rule in self._surroundings.faults.match(self.settings.id, "health-check"):
            if rule.kind in (FaultKind.ERROR, FaultKind.DROP):
                return rule.status if rule.kind is FaultKind.ERROR else 0
        try:
            async with self.session.get(
                worker.health_url + self.settings.health_check_path, timeout=aiohttp.ClientTimeout(_HEALTH_TIMEOUT_S)
            ) as response:
                return response.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return 0

    def _on_health(self, worker: BalancedWorker, status: int) -> None:
        last, worker.status = worker.status, status
        if status == HTTPStatus.NO_CONTENT:
            if worker.initializing_at is None:
                worker.initializing_at = self._surroundings.clock()
            self.fleet.touch(worker.id)
        elif status == HTTPStatus.OK:
            if worker.initializing_at is not None and last != HTTPStatus.OK:
                cold_start_s = self._surroundings.clock() - worker.initializing_at
                worker.initializing_at = None
                self.on_event(
                    f"worker {worker.id} healthy: cold start {cold_start_s:.1f} s, from its first 204 to its first 200"
                )
            self.fleet.on_poll(worker.id)
        elif last == HTTPStatus.OK and not self.fleet.is_stopping(worker.id):
            answer = f"its health check answers {status}" if status else "its health check does not answer"
            self.on_event(f"worker {worker.id} gets no requests: {answer}")
        if status != last:
            self.on_change(WORKERS_TOPIC)
