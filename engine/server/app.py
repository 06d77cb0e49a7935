"""The ASGI app that the worker serves: the health check, and vLLM's app behind open routes, limits and a log."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

from engine.backend.app import App, Message, Receive, Send
from engine.backend.inline_executor import SHORT, SHORT_BYTES
from engine.backend.merging import MERGEABLE
from engine.backend.routes import GENERATING, WEBSOCKET
from engine.cold_start import FINAL_PHASE, ColdStart
from engine.errors import InternalError, JobError, TimedOutError
from engine.jobs import job_log
from engine.jobs.cost_report import CostReport
from engine.jobs.request import check_route, http_request
from engine.json_codec import decode
from engine.run_clock import CLOCK
from engine.server.health_check import HealthCheck
from engine.server.limiter import Limiter
from engine.server.request import RunningRequest
from engine.telemetry.costs import Costs
from engine.telemetry.job_times import CURRENT, JobTimes, RequestStats

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What is served."""

    @property
    def open_routes(self) -> frozenset[str]:
        """The routes that clients may call."""

    def event_tokens(self, path: str) -> int | None:
        """Return how many tokens an event of a stream of plain text should have; None where each must be its own."""

    def has_route(self, path: str) -> bool:
        """Return whether the app has a route of this path."""

    def failure(self) -> str | None:
        """Return what is wrong with the engine for good, or None."""

    def pop_request_stats(self, job_id: str) -> list[RequestStats]:
        """Return and forget what vLLM says of a request that has finished."""

    async def app(self) -> App:
        """Return vLLM's OpenAI app."""


class ServerApp:
    """Serves requests until it is told to refuse them.

    Args:
        engine: whose app is served.
        health: answers the health check.
        limiter: of the requests that the engine runs.
        execution_timeout_s: how long a request may take, in seconds by `engine.run_clock`; None for no limit.
        log_inputs: whether the log shows JSON bodies.
        cold_start: is marked when the first request came, and when its first output was there.
        costs: counts what each request costs.
        on_started, on_ended: are called with the times of each request.

    Attributes:
        running: requests in progress, also those that wait for the engine.
        last_request_at: when the last one came, by `engine.run_clock`.
        refusal: what every new request is refused with, if any.
    """

    def __init__(  # noqa: PLR0913 (all that it depends on, so that a test can replace each)
        self,
        engine: Engine,
        health: HealthCheck,
        limiter: Limiter,
        *,
        execution_timeout_s: float | None = None,
        log_inputs: bool = False,
        cold_start: ColdStart | None = None,
        costs: Costs | None = None,
        on_started: Callable[[JobTimes], None] = lambda _: None,
        on_ended: Callable[[JobTimes], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._health = health
        self._limiter = limiter
        self._execution_timeout_s = execution_timeout_s
        self._log_inputs = log_inputs
        self._cold_start = cold_start
        self._costs = costs or Costs(CLOCK.now())
        self._on_started = on_started
        self._on_ended = on_ended
        self._cold_start_ended = "First output"
        self.running: dict[str, RunningRequest] = {}
        self.last_request_at = CLOCK.now()
        self.refusal: JobError | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        if self._health.is_for(scope):
            await self._health.answer(scope, send)
            return
        self.last_request_at = CLOCK.now()
        if self._cold_start is not None:
            self._cold_start.mark("first_take")
        request = RunningRequest(_without_trailing_slash(scope), receive, send, self._mark_first_output)
        if request.id in self.running:
            request.id = request.times.job_id = uuid.uuid4().hex
        CURRENT.set(request.times)
        self._costs.begin(request.times)
        self._on_started(request.times)
        self.running[request.id] = request
        timer = self._start_timer(request)
        described: dict[str, Any] = {"input": {"route": request.scope["path"]}}
        try:
            await self._serve(request, described)
        except JobError as error:
            await request.refuse(error)
        except asyncio.CancelledError:
            if not request.is_cancelled_here():
                raise
        except Exception:  # noqa: BLE001 (whatever it is, it ends this request and no other)
            _log.exception("Request %s failed in the engine", request.id)
            request.abort(InternalError("internal worker error; see the worker's log"))
        finally:
            timer()
            await request.end()
            del self.running[request.id]
            self._log_ended(request, described)

    async def _serve(self, request: RunningRequest, described: dict[str, Any]) -> None:
        if self.refusal is not None:
            raise self.refusal
        path = request.scope["path"]
        check_route(path, self._engine.open_routes | WEBSOCKET, self._engine.has_route)
        app = await self._engine.app()
        body = await request.body() if _has_json_body(request.scope) else None
        if request.has_left:
            return
        if body is not None and self._log_inputs:
            described["input"]["body"] = _loggable(body)
        job_log.log_started(request.id, described, with_input=self._log_inputs)
        if body is not None:
            body = self._current(request, body)
        async with self._limiter.slot() if path in GENERATING else nullcontext():
            await request.run(app, body)

    def _current(self, request: RunningRequest, body: bytes) -> bytes:
        """Return a JSON body in the names that vLLM has today; tell code deep inside vLLM about it."""
        scope = request.scope
        query = scope["query_string"].decode("latin-1")
        read = http_request(
            scope["method"], scope["path"], query, body, self._engine.event_tokens, request_id=request.id
        )
        request.costs = CostReport(request.id, read, self._engine.pop_request_stats)
        for warning in read.warnings:
            _log.warning("Job %s: %s", request.id, warning)
        # The context is that of this request's task, which uvicorn has made for it.
        SHORT.set(len(body) <= SHORT_BYTES)
        MERGEABLE.set(read.mergeable)
        return read.body or b""

    def _start_timer(self, request: RunningRequest) -> Callable[[], None]:
        limit_s = self._execution_timeout_s
        if limit_s is None:
            return lambda: None
        return CLOCK.call_later(limit_s, lambda: request.abort(TimedOutError(limit_s))).cancel

    def on_thaw(self, frozen_s: float) -> None:
        """Note that the process was frozen for so many seconds. Connections that died are for clients to open anew."""
        _log.info("Restored: the process did not run for %.1f s; %d requests in progress", frozen_s, len(self.running))
        self._cold_start, self._cold_start_ended = ColdStart(time.monotonic()), "First output since the restore"

    def _mark_first_output(self) -> None:
        """Note the first output of all, which ends the cold start, or the first since a freeze."""
        cold_start, self._cold_start = self._cold_start, None
        if cold_start is not None:
            cold_start.mark(FINAL_PHASE)
            cold_start.log(self._cold_start_ended)

    def _log_ended(self, request: RunningRequest, described: dict[str, Any]) -> None:
        times = request.times
        times.ended_at, times.outcome = CLOCK.now(), request.outcome
        try:
            times.requests += self._engine.pop_request_stats(request.id)
            self._costs.end(times)
            job_log.log_ended(described, times, self._costs.document(times), request.outputs)
            self._on_ended(times)
        except Exception:  # noqa: BLE001 (a line of the log is not worth the request)
            _log.exception("Request %s: its end could not be logged", request.id)


def _without_trailing_slash(scope: Message) -> Message:
    """Return the scope of the route that a path with a slash at its end means, as in a job.

    vLLM redirects there, to the host that the request names: behind a balancer that is not the client's.
    """
    if not scope["path"].endswith("/") or scope["path"] == "/":
        return scope
    raw_path = scope["raw_path"].removesuffix(b"/")
    return {**scope, "path": scope["path"].removesuffix("/"), "raw_path": raw_path}


def _has_json_body(scope: Message) -> bool:
    """Return whether the body is to be read here; others, such as forms with files, pass through."""
    if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
        return False
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return bool(kinds) and kinds[0].partition(b";")[0].strip().lower() == b"application/json"


def _loggable(body: bytes) -> Any:
    try:
        return decode(body)
    except (ValueError, RecursionError):
        return body.decode(errors="replace")
