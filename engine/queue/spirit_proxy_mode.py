"""Spirit's SDK as it is, in its proxy mode, where our job loop cannot stand in its place: it calls the app over HTTP.

The app is served on the loopback interface. The SDK's own faults remain: only what it proxies is answered, each call to
the agent is made once, and at most 100 connections are open.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from engine.backend.app import App, Message, Receive, Send
from engine.errors import JobError
from engine.jobs.http_server import Server, send_error, server_config, wait_for_failure
from engine.jobs.request import check_route
from engine.run_clock import CLOCK

# The SDK's session has 100 connections, for polls and acknowledgements too.
MAX_CONCURRENCY = 95
# How long the answers of running requests may take once the engine has failed, and how long a worker that was asked to
# stop waits for a request that is on its way.
_FAILURE_GRACE_S = 3.0
_QUIET_S = 1.0

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What is served."""

    @property
    def open_routes(self) -> frozenset[str]:
        """The routes that clients may call."""

    def has_route(self, path: str) -> bool:
        """Return whether the app has a route of this path."""

    def failure(self) -> str | None:
        """Return what is wrong with the engine for good, or None."""

    async def app(self) -> App:
        """Return vLLM's OpenAI app."""


class ProxyMode:
    """Serves an engine through the SDK until a signal or the engine's failure ends it.

    Args:
        engine: loaded.
        concurrency: most requests at once.
        drain_s: how long running requests may continue after SIGTERM, in seconds.
        background: returns what else runs in the event loop while it serves.
    """

    def __init__(
        self,
        engine: Engine,
        concurrency: int,
        drain_s: float,
        background: Callable[[], list[Coroutine[Any, Any, None]]] = list,
    ) -> None:
        self._background = background
        self._engine = engine
        self._concurrency = min(concurrency, MAX_CONCURRENCY)
        self._drain_s = drain_s
        self._is_draining = False
        self._running = 0
        self._last_active = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))

    def serve(self) -> int:
        """Serve; return the exit status."""
        import spirit_gpu

        with self._listener:
            host, port = self._listener.getsockname()
            try:
                spirit_gpu.start(
                    {
                        "mode": "proxy",
                        "base_url": f"http://{host}:{port}",
                        "check_start": self.check_start,
                        "concurrency_modifier": lambda _: 0 if self._is_draining else self._concurrency,
                    }
                )
            except SystemExit as end:
                return int(end.code or 0)
        return 0

    async def check_start(self) -> bool:
        """Start the server in the SDK's event loop; return whether it answers."""
        if not self._tasks:
            app = await self._engine.app()
            self._server = Server(server_config(self._with_open_routes(app)))
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop)
            for work in (self._server.serve([self._listener]), self._watch_engine(), *self._background()):
                self._tasks.append(loop.create_task(work))
        return self._server.started

    def _with_open_routes(self, app: App) -> App:
        async def serve(scope: Message, receive: Receive, send: Send) -> None:
            self._running += 1
            try:
                check_route(scope["path"], self._engine.open_routes, self._engine.has_route)
                await app(scope, receive, send)
            except JobError as error:
                await send_error(error, scope, send)
            finally:
                self._running -= 1
                self._last_active = CLOCK.now()

        return serve

    def _stop(self) -> None:
        if self._is_draining:
            raise SystemExit(1)
        self._is_draining = True
        _log.info("Worker draining: %d requests in progress", self._running)
        self._tasks.append(asyncio.get_running_loop().create_task(self._drain()))

    async def _drain(self) -> None:
        self._last_active = CLOCK.now()
        until = CLOCK.now() + self._drain_s
        while CLOCK.now() < until and (self._running or CLOCK.now() - self._last_active < _QUIET_S):  # noqa: ASYNC110 (a request may come meanwhile)
            await asyncio.sleep(0.05)
        raise SystemExit(0)

    async def _watch_engine(self) -> None:
        reason = await wait_for_failure(self._engine.failure)
        _log.error("The worker has failed: %s", reason)
        self._is_draining = True
        await asyncio.sleep(_FAILURE_GRACE_S)
        raise SystemExit(1)
