"""The emulator: all endpoints behind one HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Scope

from emulator.api import admin, client, dashboard, openai_gateway, worker
from emulator.api.auth import AppContext
from emulator.api.bodies import api_error_response, client_closed_request, http_exception_response
from emulator.api.fault_middleware import DroppableProtocol, FaultInjectionMiddleware, RouteName, runpod_route_name
from emulator.api.ports import Ports
from emulator.balancer.endpoint import BalancerEndpoint
from emulator.balancer.proxy import BalancerApp, MountedBalancerApp, balancer_route_name, endpoint_of_port
from emulator.certificate import Certificate
from emulator.control_plane.deployment import ManagedEndpoint
from emulator.control_plane.plane import ControlPlane
from emulator.control_plane.routes import routes as control_plane_routes
from emulator.core.autoscaler import TICK_INTERVAL_S
from emulator.core.endpoint import Endpoint, Surroundings
from emulator.core.faults import RUNPOD_ROUTES, SPIRIT_ROUTES, Faults
from emulator.core.process import WorkerProcess
from emulator.core.runpod_endpoint import RunPodEndpoint
from emulator.core.webhooks import Webhooks
from emulator.errors import APIError, SettingsError
from emulator.redaction import Redaction
from emulator.settings import BalancerSettings, EmulatorSettings, RunPodEndpointSettings
from emulator.spirit import agent, gateway, proxy
from emulator.spirit.endpoint import SpiritEndpoint
from emulator.spirit.route_names import agent_route_name, gateway_route_name
from emulator.spirit.settings import SpiritEmulatorSettings

_SHUTDOWN_TICK_INTERVAL_S = 0.02
_SAMPLE_INTERVAL_S = 1.0
# Longer than clients keep idle connections, so that the server closes none just as a request is sent on it.
_KEEP_ALIVE_S = 300
_STARTUP_TIMEOUT_S = 30.0
# Once all workers have exited, requests in progress have this long to end.
_GRACEFUL_SHUTDOWN_S = 1


class _UvicornServer(uvicorn.Server):
    """uvicorn's server without its signal handlers: workers must stop before the server does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Emulator:
    """The serverless platform on this machine.

    Args:
        settings: settings of the emulator and its endpoints.
        event_log: receives the timelines' lines: `(endpoint, line)`.
        worker_log: receives workers' log lines: `(worker, line)`.

    Raises:
        SettingsError: two endpoints have the same id, an address is not available, or a fault is for a route that
            the platform does not have.
    """

    def __init__(
        self,
        settings: EmulatorSettings | SpiritEmulatorSettings,
        event_log: Callable[[str, str], None] = lambda _endpoint, _line: None,
        worker_log: Callable[[str, str], None] = lambda _worker, _line: None,
    ) -> None:
        ids = [endpoint.id for endpoint in settings.endpoints]
        if len(set(ids)) != len(ids):
            raise SettingsError(f"endpoint ids must be unique: {', '.join(ids)}")
        is_spirit = isinstance(settings, SpiritEmulatorSettings)
        try:
            self.faults = Faults(settings.faults, SPIRIT_ROUTES if is_spirit else RUNPOD_ROUTES)
        except ValueError as error:
            raise SettingsError(f"faults: {error}") from None
        self._socket = _listen(settings.host, settings.port)
        host, port = self._socket.getsockname()[:2]
        # A server on all addresses is reached on the loopback address by workers and users of this machine.
        url_host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._certificate = Certificate([settings.host, url_host], os.environ) if settings.tls else None
        scheme = "https" if self._certificate else "http"
        self.url = f"{scheme}://{f'[{url_host}]' if ':' in url_host else url_host}:{port}"
        self.ca_file = self._certificate.ca_file if self._certificate else None
        """With TLS, the CA file that clients must trust; it is deleted at shutdown."""
        self._webhooks = Webhooks()
        self.agents = Ports()
        """Ports of the workers' agents, on Spirit."""
        self._balancer_ports = Ports(host, self._certificate.context if self._certificate else None)
        environment = dict(os.environ)
        for endpoint in settings.endpoints:
            environment |= endpoint.env
        self._surroundings = Surroundings(
            clock=time.monotonic,
            wall_clock=time.time,
            start=WorkerProcess,
            faults=self.faults,
            redaction=Redaction(environment, settings.api_keys),
            event_log=event_log,
            worker_log=worker_log,
        )
        self.endpoints: dict[str, Endpoint] = {}
        """All endpoints by id; the control plane creates and deletes some."""
        self._control_plane: ControlPlane | None = None
        self._deleted: dict[str, Endpoint] = {}
        try:
            self._add_endpoints(settings)
        except SettingsError:
            self._socket.close()
            self.agents.stop()
            self._balancer_ports.stop()
            raise
        self._finished = asyncio.Event()
        context = AppContext(self.endpoints, settings.api_keys, self.faults, self._deleted, self._finished)
        if is_spirit:
            routes = [*gateway.routes, *proxy.routes, *admin.routes, *dashboard.routes]
            self.app = _app(routes, context, gateway_route_name)
        else:
            self.app = _app(_runpod_routes(context), context, runpod_route_name)
            self.app.state.control_plane = self._control_plane
        self._agent_app = _app(agent.routes, context, agent_route_name(self.agents))
        self._agent_app.state.agents = self.agents
        endpoint_of = endpoint_of_port(self._balancer_ports)
        self._balancer_app = FaultInjectionMiddleware(
            BalancerApp(context, endpoint_of), context, balancer_route_name(endpoint_of)
        )
        self._stop_requested = asyncio.Event()

    def _add_endpoints(self, settings: EmulatorSettings | SpiritEmulatorSettings) -> None:
        if isinstance(settings, SpiritEmulatorSettings):
            for service in settings.endpoints:
                self.endpoints[service.id] = SpiritEndpoint(service, self._surroundings, self.agents)
            return
        plane = ControlPlane(settings.control_plane, self._surroundings, self._create_endpoint)
        self._control_plane, self.endpoints, self._deleted = plane, plane.endpoints, plane.deleted
        for endpoint in settings.endpoints:
            plane.add(endpoint)

    def _create_endpoint(self, settings: RunPodEndpointSettings, surroundings: Surroundings) -> ManagedEndpoint:
        """Create an endpoint on RunPod.

        Raises:
            SettingsError: its port is not available.
        """
        if isinstance(settings, BalancerSettings):
            return BalancerEndpoint(settings, surroundings, ports=self._balancer_ports, base_url=self.url)
        return RunPodEndpoint(
            settings,
            surroundings,
            base_url=self.url,
            ca_environment=self._certificate.environment if self._certificate else {},
            webhooks=self._webhooks,
        )

    def stop(self) -> None:
        """Shut down gracefully: workers may still deliver results. A second call kills all workers at once."""
        if self._stop_requested.is_set():
            for endpoint in self._all_endpoints():
                endpoint.fleet.kill_all()
        self._stop_requested.set()

    def _all_endpoints(self) -> list[Endpoint]:
        """Return the endpoints, and the deleted ones whose workers have not exited yet."""
        return [*self.endpoints.values(), *self._deleted.values()]

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop` is called; return when all workers have exited.

        Args:
            on_ready: called when the server answers requests.
        """
        certificate = self._certificate
        config = _server_config(
            self.app,
            ssl_context_factory=None if certificate is None else lambda _config, _default: certificate.context,
        )
        server = _UvicornServer(config)
        self.agents.start(_server_config(self._agent_app), server.server_state)
        self._balancer_ports.start(_server_config(self._balancer_app, ws="auto"), server.server_state)
        serving = asyncio.create_task(server.serve([self._socket]), name="serve")
        try:
            while not server.started and not self._stop_requested.is_set():
                if serving.done():
                    await serving
                await asyncio.sleep(0.01)
            if server.started:
                on_ready()
            supervising = asyncio.create_task(self._supervise(), name="supervise")
            await asyncio.wait({supervising, serving}, return_when=asyncio.FIRST_COMPLETED)
            if supervising.done():
                supervising.result()
            supervising.cancel()
        finally:
            self._finished.set()
            for endpoint in self._all_endpoints():
                endpoint.fleet.close()
                endpoint.fleet.kill_all()
                # No worker is left to run the jobs: cancelling them answers the clients that wait for one.
                endpoint.queue.close()
                await endpoint.close()
            if certificate is not None:
                certificate.remove()
            await self._webhooks.close()
            self.agents.stop()
            self._balancer_ports.stop()
            server.should_exit = True
            await serving
            for connection in server.server_state.connections:
                connection.transport.abort()

    async def _supervise(self) -> None:
        """Run fleets and queues until `stop` is called, and then until all workers have exited."""
        sampled_at = 0.0
        while not self._stop_requested.is_set() or not all(
            endpoint.fleet.is_empty for endpoint in self._all_endpoints()
        ):
            for endpoint in self.endpoints.values():
                if self._stop_requested.is_set():
                    endpoint.fleet.close()
                endpoint.fleet.tick()
            if time.monotonic() - sampled_at >= _SAMPLE_INTERVAL_S:
                sampled_at = time.monotonic()
                for endpoint in self.endpoints.values():
                    endpoint.sample()
                if self._control_plane is not None:
                    self._control_plane.sample()
            if self._control_plane is not None:
                await self._control_plane.tick()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_requested.wait(), TICK_INTERVAL_S)
            if self._stop_requested.is_set():
                await asyncio.sleep(_SHUTDOWN_TICK_INTERVAL_S)


def _runpod_routes(context: AppContext) -> list[BaseRoute]:
    """Return RunPod's routes, in the order in which they are matched: the most frequent first."""
    balancer = MountedBalancerApp(context)
    path = "/balancer/{balancer}/{path:path}"
    return [
        *worker.routes,
        *openai_gateway.routes,
        *client.routes,
        *control_plane_routes,
        *admin.routes,
        *dashboard.routes,
        Route(path, balancer),
        WebSocketRoute(path, balancer),
    ]


def _app(routes: Sequence[BaseRoute], context: AppContext, name: Callable[[Scope], RouteName]) -> Starlette:
    """Return an app that injects faults, and answers errors as the platforms do."""
    app = Starlette(
        routes=routes,
        middleware=[Middleware(FaultInjectionMiddleware, context=context, name=name)],
        exception_handlers={
            APIError: api_error_response,
            HTTPException: http_exception_response,
            ClientDisconnect: client_closed_request,
        },
    )
    app.state.context = context
    return app


def _server_config(app: ASGIApp, **options: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=DroppableProtocol,
        **{"ws": "none", **options},
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_S,
    )


@contextlib.contextmanager
def run_in_thread(
    settings: EmulatorSettings | SpiritEmulatorSettings,
    event_log: Callable[[str, str], None] = lambda _endpoint, _line: None,
) -> Iterator[Emulator]:
    """Run an emulator in a thread, for tests and measurements: ready on entry, shut down with its workers on exit.

    Args:
        settings: settings of the emulator; with port 0 a free one is used, see `Emulator.url`.
        event_log: as for `Emulator`; called in that thread.

    Raises:
        TimeoutError: it does not start in time.
    """
    emulator = Emulator(settings, event_log)
    started = threading.Event()
    failures: list[BaseException] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await emulator.run(started.set)

    def main() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve())
        except BaseException as failure:  # noqa: BLE001 (raised again in the caller's thread)
            failures.append(failure)
        finally:
            started.set()

    thread = threading.Thread(target=main, name="emulator", daemon=True)
    thread.start()
    if not started.wait(_STARTUP_TIMEOUT_S):
        failures.append(TimeoutError(f"the emulator did not start within {_STARTUP_TIMEOUT_S:g} s"))
    try:
        if not failures:
            yield emulator
    finally:
        if loops and not loops[0].is_closed():
            loops[0].call_soon_threadsafe(emulator.stop)
        # An emulator that blocks during startup may not process the stop.
        thread.join(_STARTUP_TIMEOUT_S if failures else None)
    if failures:
        raise failures[0]


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # Two sockets can be bound to one address with SO_REUSEADDR, but only one can listen.
        listener.listen()
    except OSError as error:
        listener.close()
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener
