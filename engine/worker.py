"""The life of the worker: `Worker.start` loads the engine, `serve` runs jobs, `shutdown` ends the engine."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from engine import child_processes, cold_start, health
from engine.backend import startup_errors, startup_logs, startup_phases, vllm_args
from engine.config import environment
from engine.config.settings import Settings
from engine.errors import ConfigurationError
from engine.queue.admission import Admission
from engine.run_clock import CLOCK
from engine.startup import configure, model_resolver, weight_prefetch
from engine.startup.caches import Caches
from engine.telemetry import otlp_variables
from engine.telemetry.costs import Costs
from engine.telemetry.identity import platform_identity

if TYPE_CHECKING:
    from engine.backend.configuration import Configuration
    from engine.backend.vllm_engine import VLLMEngine
    from engine.config.environment import Variable
    from engine.queue.job_loop import Handler
    from engine.queue.protocol import JobQueue
    from engine.server.health_check import HealthCheck
    from engine.server.listeners import Listeners
    from engine.server.loading import LoadingServer
    from engine.startup.fitness import Checks
    from engine.telemetry.export import Export
    from engine.telemetry.job_times import JobHooks

# vLLM tokenizes long requests in a thread. While it and the event loop are both busy, each waits this long for the GIL,
# several times a request; Python's default is 5 ms.
SWITCH_INTERVAL_S = 0.001
# gc.set_threshold: collect generation 0 after 20,000 net allocations (default 700), older ones every 20th time. 64
# streams keep about 20,000 live objects.
GC_THRESHOLDS = (20_000, 20, 20)
_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
# How long the end of the worker waits for a collector of telemetry.
FLUSH_TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)


class Worker:
    """One engine and the jobs that run on it.

    Args:
        engine: loaded.
        settings: the worker's own.
        caches: of what the engine has compiled, to be packed for other workers.
    """

    def __init__(self, engine: VLLMEngine, settings: Settings, caches: Caches | None = None) -> None:
        self.engine = engine
        self._settings = settings
        self._caches = caches
        self._costs = Costs(cold_start.WORKER.started_at, settings.price_per_second)
        self._export: Export | None = None

    @classmethod
    def start(cls, variables: Mapping[str, Variable] | None = None, checks: Checks | None = None) -> Self:
        """Load the engine, which takes as long as the model needs.

        Args:
            variables: that configure the worker; those of this process by default.
            checks: of the machine, which must pass before the engine is loaded.

        Raises:
            ConfigurationError: the settings, the machine or the model do not let the worker start.
        """
        timer = cold_start.WORKER
        child_processes.kill_children_on_exit()
        variables = environment.read() if variables is None else variables
        settings = Settings.read(variables)
        if settings.otel_exporter_otlp_endpoint is not None:
            otlp_variables.remove_defaults(os.environ)
            otlp_variables.check({**os.environ, _ENDPOINT: settings.otel_exporter_otlp_endpoint})
        environment.export_token(variables)
        caches = Caches(
            settings.compile_cache_dir, settings.network_volume, model_resolver.named_model(settings, variables)
        )
        directory = model_resolver.guess_model_dir(settings, variables)
        if directory is not None and not weight_prefetch.has_own_reader(variables):
            weight_prefetch.start(directory)
        with _gc_paused_then_frozen():
            from engine.backend import vllm_engine

            vllm_engine.import_engine()
        timer.mark("imports")
        configuration = configure.read(variables)
        timer.mark("configuration")
        if checks is not None:
            checks.wait()
            timer.mark("fitness")
        _download(configuration)
        timer.mark("model_files")
        caches.wait()
        _log.info("Loading the engine")
        engine = _load_engine(configuration, caches)
        _log.info("Engine ready after %.1f s, serving %s", timer.total_s, ", ".join(configuration.model.names))
        return cls(engine, settings, caches)

    @property
    def max_concurrency(self) -> int:
        """Maximum number of jobs at once."""
        limit = self._settings.max_concurrency
        return self.engine.max_num_seqs if limit == "auto" else limit

    @property
    def _flush_timeout_s(self) -> float:
        return 0.0 if self._settings.otel_exporter_otlp_endpoint is None else FLUSH_TIMEOUT_S

    async def serve(self, queue: JobQueue, handler: Handler) -> int:
        """Take jobs and run them until SIGTERM or SIGINT, or until the engine fails; a second signal ends at once.

        Args:
            queue: where jobs come from.
            handler: an async generator of a job's outputs.

        Returns:
            The exit status: 0 if the worker was asked to stop, 1 if the engine has failed.
        """
        from engine.queue.job_loop import JobLoop, Timeouts

        engine, settings = self.engine, self._settings
        _tune_interpreter()
        jobs = JobLoop(
            queue,
            handler,
            self._admission(),
            load_changed=engine.statistics.changed,
            failure=engine.failure,
            timeouts=Timeouts(settings.drain_timeout_s, settings.delivery_timeout_s, settings.execution_timeout_s),
            pop_request_stats=engine.pop_request_stats,
            log_inputs=settings.log_job_inputs,
            cold_start=cold_start.WORKER,
            costs=self._costs,
            **self._start_export(),
        )
        cold_start.WORKER.mark("sdk")
        _stop_on_signals(jobs.stop, settings.drain_timeout_s + self._flush_timeout_s)
        await self._make_ready()
        self._note_ready()
        jobs.supervise(health.heartbeat(engine.failure), "heartbeat")
        with CLOCK.watched(jobs.on_thaw):
            return await jobs.run()

    def _start_export(self) -> JobHooks:
        """Start to export telemetry, if there is a collector; return what the job loop should tell the export."""
        endpoint = self._settings.otel_exporter_otlp_endpoint
        if endpoint is None:
            return {}
        from engine.telemetry.export import Export

        engine = self.engine
        identity = {**platform_identity(), **engine.device_attributes}
        try:
            self._export = Export(
                endpoint, identity, self._costs, engine.statistics, engine_is_traced=engine.exports_traces
            )
        except Exception:  # noqa: BLE001 (the model is loaded: jobs are worth more than their telemetry)
            _log.exception("OpenTelemetry refuses its variables: jobs are served without telemetry")
            return {}
        return {"on_started": self._export.job_started, "on_ended": self._export.job_ended}

    async def serve_http(self, listeners: Listeners, loading: LoadingServer, check: HealthCheck) -> int:
        """Serve vLLM's app over HTTP until SIGTERM or SIGINT, or until the engine fails; a second signal ends at once.

        Args:
            listeners: are accepted on.
            loading: has accepted on them until now.
            check: answers the balancer.

        Returns:
            The exit status: 0 if the worker was asked to stop, 1 if the engine has failed.
        """
        from engine.server.app import ServerApp
        from engine.server.limiter import Limiter
        from engine.server.service import Service

        engine, settings = self.engine, self._settings
        _tune_interpreter()
        limiter = Limiter(self._admission().available_slots, engine.statistics.changed)
        app = ServerApp(
            engine,
            check,
            limiter,
            execution_timeout_s=settings.execution_timeout_s,
            log_inputs=settings.log_job_inputs,
            cold_start=cold_start.WORKER,
            costs=self._costs,
            **self._start_export(),
        )
        service = Service(app, check, limiter, engine.failure, settings.drain_timeout_s)
        _stop_on_signals(service.stop, settings.drain_timeout_s + self._flush_timeout_s)
        await self._make_ready()
        service.supervise(health.heartbeat(engine.failure), "heartbeat")
        with CLOCK.watched(app.on_thaw):
            return await service.run(listeners, loading, self._note_ready)

    async def _make_ready(self) -> None:
        """Make the app, and run a first request if the settings ask for it."""
        from engine.jobs import warm_up

        await self.engine.app()
        cold_start.WORKER.mark("app")
        if self._settings.warm_up:
            await warm_up.run(self.engine)
            self.engine.pop_request_stats(warm_up.JOB_ID)
            cold_start.WORKER.mark("first_request")

    def _note_ready(self) -> None:
        cold_start.WORKER.log("Cold start")
        self._costs.seconds.ready()
        if self._export is not None:
            self._export.cold_start_ended(cold_start.WORKER)
        if self._caches is not None:
            self._caches.pack_later()

    def _admission(self) -> Admission:
        engine = self.engine
        return Admission(engine.statistics, self.max_concurrency, engine.cache_tokens, engine.max_model_len)

    def shutdown(self) -> None:
        """End the engine and its processes."""
        if self._caches is not None:
            self._caches.close()
        self.engine.shutdown()
        if self._costs.seconds.has_served:
            self._costs.log_summary()
        if self._export is not None:
            self._export.shutdown(self._flush_timeout_s)


_lock = threading.Lock()
_current: Worker | None = None


def current(variables: Mapping[str, Variable] | None = None, checks: Checks | None = None) -> Worker:
    """Return this process's worker; the first call starts it (`Worker.start`)."""
    global _current  # noqa: PLW0603 (a handler is a plain function: its worker must be found from the module)
    with _lock:
        if _current is None:
            _current = Worker.start(variables, checks)
        return _current


def shutdown() -> None:
    """End this process's worker, if it was started."""
    global _current  # noqa: PLW0603
    with _lock:
        if _current is not None:
            _current.shutdown()
            _current = None


def _download(configuration: Configuration) -> None:
    """Download what is missing of the model and its adapters; after that, the hub is not asked again if possible."""
    model_resolver.download(configuration.model)
    vllm_args.download_adapters(configuration.flags, configuration.args, configuration.model)
    model_resolver.enable_offline_mode(configuration.model, configuration.flags)


def _load_engine(configuration: Configuration, caches: Caches) -> VLLMEngine:
    """Load the engine, and import meanwhile what is needed after it.

    Raises:
        ConfigurationError: it does not start; the message is the reason, from whichever process knows it.
    """
    from engine.backend import vllm_engine

    with startup_logs.captured() as logs, _import_app_in_background(configuration.settings):
        try:
            engine = vllm_engine.VLLMEngine(configuration)
        except ConfigurationError:
            raise
        except Exception as error:
            _log.debug("The engine does not start", exc_info=error)
            reason = startup_errors.explain(error, logs.errors, configuration.model.path, configuration.flags)
            raise ConfigurationError(reason) from error
        records = logs.records
        cold_start.WORKER.split_engine_phase(startup_phases.phases(records))
        compile_cache = startup_phases.compile_cache(records)
        if compile_cache is not None:
            cold_start.WORKER.note_cache("compile", compile_cache)
        caches.log_usage(compile_cache)
    return engine


def _tune_interpreter() -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GC_THRESHOLDS)


@contextmanager
def _gc_paused_then_frozen() -> Iterator[None]:
    """Pause the garbage collector during imports, where it takes a fifth of the time and finds hardly anything.

    What was imported is frozen: it is not scanned again, and so stays shared with forked processes.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _import_app_in_background(settings: Settings) -> Iterator[None]:
    """Import what is needed after the engine while its processes start: from when the first of them is forked.

    No process may be forked during an import: in the child, the import lock would stay locked for ever. So a later
    fork, as a coordinator makes for data parallelism, first waits for the imports to end. Where processes are spawned,
    nothing is imported here.
    """

    def imports() -> None:
        from engine.backend import vllm_engine
        from engine.queue import runpod_client

        vllm_engine.import_app()
        if settings.otel_exporter_otlp_endpoint is not None:
            importlib.import_module("engine.telemetry.export")
        if settings.queue == "runpod":
            runpod_client.import_sdk()

    process = os.getpid()
    importing = threading.Thread(target=imports, daemon=True)
    pending = [importing]

    def begin() -> None:
        if pending and os.getpid() == process:  # Forked processes inherit this hook, and fork their own children.
            pending.pop().start()

    def finish() -> None:
        if importing.is_alive() and threading.current_thread() is not importing:
            importing.join()

    os.register_at_fork(before=finish, after_in_parent=begin)
    try:
        yield
    finally:
        if pending:
            pending.clear()
        else:
            importing.join()


def _stop_on_signals(stop: Callable[[], None], own_timeout_s: float) -> None:
    """Call `stop` at the first SIGTERM or SIGINT, and end the process at the second, or when stopping takes too long.

    The limit holds whatever hangs: the platform kills a worker that does not end, and with it what was not delivered.

    Args:
        stop: begins the drain.
        own_timeout_s: how long the drain, and the last export of telemetry, may take. The rest is constant.
    """
    from engine.backend.vllm_engine import SHUTDOWN_TIMEOUT_S
    from engine.queue.job_loop import ABANDON_TIMEOUT_S, FINAL_DELIVERY_TIMEOUT_S

    limit_s = own_timeout_s + FINAL_DELIVERY_TIMEOUT_S + ABANDON_TIMEOUT_S + SHUTDOWN_TIMEOUT_S
    stopping = threading.Event()

    def on_signal() -> None:
        if stopping.is_set():
            os._exit(1)  # The engine's processes end with this one.
        stopping.set()
        stop()
        threading.Thread(target=_end_overdue, args=(limit_s,), name="end overdue", daemon=True).start()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)


def _end_overdue(limit_s: float) -> None:
    CLOCK.sleep(limit_s)
    _log.error("The worker has not ended %.0f s after it was asked to stop: ending it now", limit_s)
    os._exit(1)
