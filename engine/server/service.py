"""The life of the worker's HTTP server: it serves, drains without losing a request, and ends.

READY ──stop()──▶ DRAINING ──▶ ENDED, exit status 0
└────fail()────▶ FAILED ───▶ ENDED, exit status 1
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from engine.errors import WorkerShutdownError, safe_str
from engine.jobs.http_server import Server, server_config, wait_for_failure
from engine.run_clock import CLOCK
from engine.server.app import ServerApp
from engine.server.health_check import Health, HealthCheck
from engine.server.limiter import Limiter
from engine.server.listeners import Listeners
from engine.server.loading import LoadingServer
from engine.server.request import ABORT_GRACE_S

# A worker that drains accepts requests until the balancer has noticed: it was told twice, as one answer may be ignored,
# and has sent nothing for a while. Without health checks, it accepts them for this long.
_TOLD_TIMES = 2
_QUIET_S = 1.0
_UNNOTICED_S = 5.0
# How long vLLM's own errors may take to reach the clients once the engine has failed.
_FAILURE_GRACE_S = 3.0
_POLL_INTERVAL_S = 0.05

_log = logging.getLogger(__name__)


class Service:
    """Serves an app until it is asked to stop or the engine fails.

    Args:
        app: with its requests in progress.
        health: what the balancer is told.
        limiter: of the app's requests.
        failure: returns what is wrong with the engine for good, or None.
        drain_s: how long running requests may continue after `stop`, in seconds by `engine.run_clock`.
    """

    def __init__(
        self,
        app: ServerApp,
        health: HealthCheck,
        limiter: Limiter,
        failure: Callable[[], str | None],
        drain_s: float,
    ) -> None:
        self._app = app
        self._health = health
        self._limiter = limiter
        self._failure = failure
        self._drain_s = drain_s
        self._failed: str | None = None
        self._ending = asyncio.Event()
        self._ending_since = 0.0
        self._supervised: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Tell the balancer to send nothing more, and end when the running requests have ended."""
        if not self._ending.is_set():
            self._begin_ending("draining")

    def fail(self, reason: str) -> None:
        """Refuse all requests, and end: the worker cannot serve any more."""
        if self._failed is None:
            self._failed = reason
            _log.error("The worker has failed: %s", reason)
            self._app.refusal = WorkerShutdownError(f"the worker has failed: {reason}")
            self._begin_ending("failed")

    def supervise(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run a task until the end; if it ends with an exception, the worker fails."""
        task = asyncio.create_task(work, name=name)
        self._supervised.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("Task %r failed", task.get_name(), exc_info=error)
            self.fail(f"its task {task.get_name()!r} ended with {safe_str(error)}")

    def _begin_ending(self, how: str) -> None:
        self._health.state = Health.DRAINING
        self._ending_since = CLOCK.now()
        self._ending.set()
        _log.info("Worker %s: %d requests in progress", how, len(self._app.running))

    async def run(self, listeners: Listeners, loading: LoadingServer, on_ready: Callable[[], None]) -> int:
        """Serve until `stop` or `fail`.

        Args:
            listeners: are accepted on.
            loading: has accepted on them until now.
            on_ready: is called when the balancer may send requests.

        Returns:
            The exit status: 0, or 1 if the worker has failed.
        """
        config = server_config(self._app, ws_max_size=30 << 20, timeout_graceful_shutdown=1)
        server = Server(config)
        serving = asyncio.create_task(server.serve(listeners.duplicates()), name="serve")
        serving.add_done_callback(self._task_ended)
        self.supervise(self._watch_engine(), "watch the engine")
        self.supervise(self._limiter.run(), "start waiting requests")
        try:
            while not server.started and not serving.done():  # noqa: ASYNC110 (uvicorn sends no event)
                await asyncio.sleep(0.005)
            await loading.hand_over()
            if not self._ending.is_set():
                self._health.state = Health.READY
                on_ready()
            await self._ending.wait()
            await self._end_requests()
        finally:
            for task in self._supervised:
                task.cancel()
            listeners.close()
            server.should_exit = True
            await serving
        return int(self._failed is not None)

    async def _watch_engine(self) -> None:
        self.fail(await wait_for_failure(self._failure))

    async def _end_requests(self) -> None:
        """Serve what still comes until the balancer has noticed, and what runs for the drain time; abort the rest."""
        deadline = self._ending_since + self._drain_s
        await self._poll(
            lambda: self._failed is not None or self._has_balancer_noticed(),
            min(self._ending_since + _UNNOTICED_S, deadline),
        )
        if self._failed is None:
            self._app.refusal = WorkerShutdownError("the worker is ending; try again")
        await self._poll(lambda: self._failed is not None or not self._app.running, deadline)
        error = WorkerShutdownError("the worker was asked to stop before the request had ended; try again")
        if self._failed is not None:
            error = WorkerShutdownError(f"the worker has failed: {self._failed}")
            await self._poll(lambda: not self._app.running, CLOCK.now() + _FAILURE_GRACE_S)
        for request in list(self._app.running.values()):
            request.abort(error)
        await self._poll(lambda: not self._app.running, CLOCK.now() + ABORT_GRACE_S + 1)

    async def _poll(self, is_over: Callable[[], bool], until: float) -> None:
        while not is_over() and CLOCK.now() < until:  # noqa: ASYNC110 (of several kinds of events, at the end only)
            await asyncio.sleep(_POLL_INTERVAL_S)

    def _has_balancer_noticed(self) -> bool:
        is_quiet = CLOCK.now() - self._app.last_request_at >= _QUIET_S
        return self._health.drain_answers >= _TOLD_TIMES and is_quiet
