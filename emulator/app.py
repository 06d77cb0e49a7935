"""The emulator as a whole: endpoints behind one HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator

import uvicorn
import uvloop
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from emulator.api import admin, client, dashboard, openai_gateway, worker
from emulator.api.auth import Platform, gone, refusal
from emulator.api.fault_middleware import DroppableProtocol, FaultInjection
from emulator.certificate import Certificate
from emulator.core.endpoint import Endpoint
from emulator.core.faults import Faults, FaultSettings
from emulator.core.process import WorkerProcess
from emulator.core.webhooks import Webhooks
from emulator.errors import ConfigurationError, RefusedError
from emulator.redaction import Redaction
from emulator.settings import EndpointSettings

_TICK_S = 0.1
_SAMPLE_S = 1.0
# Longer than clients keep a connection, so that none is closed just as a request is sent on it.
_KEEP_ALIVE_S = 300
_STARTUP_S = 30.0
# What is left of connections when all workers have ended is cut off after so long.
_LAST_ANSWERS_S = 1


class EmulatorSettings(BaseModel):
    """All that an emulator is told; `--config` reads it from a JSON file."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    tls: bool = False
    api_keys: tuple[str, ...] = Field(("local",), alias="apiKeys", min_length=1)
    endpoints: tuple[EndpointSettings, ...] = Field((EndpointSettings(),), min_length=1)
    faults: FaultSettings = FaultSettings()


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to us: workers end before it does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Emulator:
    """A platform on this machine.

    Args:
        settings: what it is told.
        event_log: takes lines for a person to read: `(endpoint, line)`.
        worker_log: takes workers' log lines: `(worker, line)`.

    Raises:
        ConfigurationError: two endpoints have the same id, or the address cannot be listened on.
    """

    def __init__(
        self,
        settings: EmulatorSettings,
        event_log: Callable[[str, str], None] = lambda _endpoint, _line: None,
        worker_log: Callable[[str, str], None] = lambda _worker, _line: None,
    ) -> None:
        ids = [endpoint.id for endpoint in settings.endpoints]
        if len(set(ids)) != len(ids):
            raise ConfigurationError(f"two endpoints have the same id: {', '.join(ids)}")
        self._settings = settings
        self._socket = _listen(settings.host, settings.port)
        host, port = self._socket.getsockname()[:2]
        # Workers and people on this machine reach a server on all addresses by the loopback one.
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._certificate = Certificate([settings.host, shown], os.environ) if settings.tls else None
        self.url = f"http{'s' if self._certificate else ''}://{f'[{shown}]' if ':' in shown else shown}:{port}"
        self.ca_file = self._certificate.ca_file if self._certificate else None
        """The CA that clients have to trust, over TLS; its file lasts as long as the emulator runs."""
        self.faults = Faults(settings.faults)
        self._webhooks = Webhooks()
        self._event_log, self._worker_log = event_log, worker_log
        environment = dict(os.environ)
        for endpoint in settings.endpoints:
            environment |= endpoint.env
        self._redaction = Redaction(environment, settings.api_keys)
        self.endpoints = {it.id: self._endpoint(it) for it in settings.endpoints}
        platform = Platform(self.endpoints, settings.api_keys, self.faults)
        self.app = Starlette(
            # Those that are called most come first.
            routes=[*worker.routes, *openai_gateway.routes, *client.routes, *admin.routes, *dashboard.routes],
            middleware=[Middleware(FaultInjection, platform=platform)],
            exception_handlers={RefusedError: refusal, ClientDisconnect: gone},
        )
        self.app.state.platform = platform
        self._stop = asyncio.Event()
        self._force = False

    def _endpoint(self, settings: EndpointSettings) -> Endpoint:
        return Endpoint(
            settings,
            base_url=self.url,
            ca_environment=self._certificate.environment if self._certificate else {},
            clock=time.monotonic,
            wall_clock=time.time,
            start=WorkerProcess,
            faults=self.faults,
            webhooks=self._webhooks,
            redaction=self._redaction,
            event_log=self._event_log,
            worker_log=self._worker_log,
        )

    def stop(self) -> None:
        """End: workers are asked to end and may deliver what they have; asked again, all ends at once."""
        self._force = self._stop.is_set()
        self._stop.set()
        if self._force:
            for endpoint in self.endpoints.values():
                endpoint.fleet.kill_all()

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`; return when no worker is left.

        Args:
            ready: called when requests are answered.
        """
        certificate = self._certificate
        config = uvicorn.Config(
            self.app,
            ssl_context_factory=None if certificate is None else lambda _config, _default: certificate.context,
            http=DroppableProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_LAST_ANSWERS_S,
        )
        server = _Server(config)
        serving = asyncio.ensure_future(server.serve([self._socket]))
        try:
            while not server.started and not self._stop.is_set():
                if serving.done():
                    await serving
                await asyncio.sleep(0.01)
            if server.started:
                ready()
            keeping = asyncio.ensure_future(self._keep())
            await asyncio.wait({keeping, serving}, return_when=asyncio.FIRST_COMPLETED)
            if keeping.done():
                keeping.result()
            keeping.cancel()
        finally:
            for endpoint in self.endpoints.values():
                # Not only for its workers: who watches is told too that this is the end.
                endpoint.fleet.close()
                endpoint.fleet.kill_all()
                # Nobody is left to do them: who waits for one is told.
                endpoint.queue.close()
            if certificate is not None:
                certificate.remove()
            await self._webhooks.close()
            server.should_exit = True
            await serving
            for connection in server.server_state.connections:
                connection.transport.abort()

    async def _keep(self) -> None:
        """Look after workers and queues until told to stop, and then until the workers are gone."""
        sampled = 0.0
        while not self._stop.is_set() or not all(endpoint.fleet.empty for endpoint in self.endpoints.values()):
            for endpoint in self.endpoints.values():
                if self._stop.is_set():
                    endpoint.fleet.close()
                endpoint.fleet.tick()
            if time.monotonic() - sampled >= _SAMPLE_S:
                sampled = time.monotonic()
                for endpoint in self.endpoints.values():
                    endpoint.sample()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _TICK_S)
            if self._stop.is_set():
                await asyncio.sleep(_TICK_S / 5)


@contextlib.contextmanager
def background(settings: EmulatorSettings) -> Iterator[Emulator]:
    """An emulator in a thread of its own, for tests and measurements: ready within, and gone, workers and all, after.

    Args:
        settings: what it is told; port 0 is any free one, which `Emulator.url` has.

    Raises:
        TimeoutError: it does not start in time.
    """
    emulator = Emulator(settings)
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
        except BaseException as failure:  # noqa: BLE001 (it is raised again where it can be seen)
            failures.append(failure)
        finally:
            started.set()

    thread = threading.Thread(target=main, name="emulator", daemon=True)
    thread.start()
    if not started.wait(_STARTUP_S):
        failures.append(TimeoutError(f"the emulator has not started within {_STARTUP_S:g} s"))
    try:
        if not failures:
            yield emulator
    finally:
        if loops and not loops[0].is_closed():
            loops[0].call_soon_threadsafe(emulator.stop)
        # One that hangs as it starts may not hear of it.
        thread.join(_STARTUP_S if failures else None)
    if failures:
        raise failures[0]


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigurationError(f"{host}:{port} cannot be listened on: {error.strerror}") from None
    return listening
