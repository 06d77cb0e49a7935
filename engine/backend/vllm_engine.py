"""vLLM: the engine and vLLM's own OpenAI app over it, in this process. Its arguments are in `engine.backend.vllm_args`.

Written against vLLM 0.32. What it uses of vLLM is what `vllm serve` itself is made of; a test of its own
(tests/integration/test_vllm_interface.py) says what has moved when an upgrade moves something.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import importlib
import logging
import os
import re
import time
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import aiohttp
from starlette.routing import Match

from engine.backend import compat, startup_errors, vllm_args
from engine.backend.media import public_session
from engine.backend.routes import SERVING
from engine.backend.statistics import Statistics
from engine.cold_start import WORKER
from engine.config.redaction import redacted
from engine.errors import ConfigurationError, described
from engine.jobs import asgi
from engine.jobs.event_batcher import interval_s, interval_tokens

if TYPE_CHECKING:
    from engine.jobs.asgi import App
    from engine.startup.configuration import Configuration

SHUTDOWN_TIMEOUT_S = 5.0
# A first step may compile kernels: it may take so many times what a later one may.
FIRST_STEP_FACTOR = 5
_ENGINE_MODULES = (
    "vllm.engine.arg_utils",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
)
_APP_MODULES = ("vllm.entrypoints.launchers.app", "vllm.entrypoints.launchers.api_server.app_state")

_log = logging.getLogger(__name__)


class Server:
    """vLLM's engine, loaded by the constructor, and its OpenAI app.

    The constructor runs in plain code, before any event loop, and takes as long as the model needs to load. The app
    belongs to the event loop that first asks for it.

    Raises:
        ConfigurationError: vLLM does not accept the settings.
    """

    _failed: str | None = None  # Why there is no app, and will be none

    def __init__(self, configuration: Configuration) -> None:
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        compat.check_version()
        compat.keep_deltas_apart()
        _keep_media_public()
        self.statistics = Statistics(self._answer_tokens)
        self._stall_timeout_s = configuration.settings.engine_stall_timeout_s
        self._batch_interval_s = configuration.settings.batch_interval_ms / 1000
        self._allowed_routes = configuration.settings.allowed_routes
        self.open_routes = SERVING | self._allowed_routes
        self._user_set_interval = configuration.flags.value("stream_interval") is not None
        self._parses_chats = True
        self._args = configuration.args
        self._flags = configuration.flags
        start_method = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")
        arguments, config = configuration.engine_config
        if start_method is None:
            _fork_processes()
        self._engine = AsyncLLM.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            stat_loggers=self._stat_loggers(),
            enable_log_requests=arguments.enable_log_requests,
            disable_log_stats=arguments.disable_log_stats,
        )
        self._idle_at = time.monotonic()
        self._app: Any = None
        self._lock = asyncio.Lock()

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return int(self._engine.model_config.max_model_len)

    @property
    def max_num_seqs(self) -> int:
        """The most requests that the engine runs at once."""
        return int(self._engine.vllm_config.scheduler_config.max_num_seqs)

    @property
    def cache_tokens(self) -> int:
        """How many tokens fit the KV cache.

        vLLM's own count, where it has one: where layers cache differently, blocks times their size is too much.
        """
        cache = self._engine.vllm_config.cache_config
        if (tokens := getattr(cache, "kv_cache_size_tokens", None)) is not None:
            return int(tokens)
        return int((cache.num_gpu_blocks or 0) * cache.block_size)

    @property
    def batch_interval_s(self) -> float:
        """Least time between two outputs of a stream, in seconds: longer, the more requests run."""
        return interval_s(self._batch_interval_s, self.statistics.running)

    def event_tokens(self, path: str) -> int | None:
        """How many tokens vLLM should make one event of, in a stream of plain text that begins now on this route.

        None where a parser looks at each of them.
        """
        if self._parses_chats and path == "/v1/chat/completions":
            return None
        if self._user_set_interval:
            return 1
        return interval_tokens(self._batch_interval_s, self.statistics.running, self.statistics.step_s)

    def _answer_tokens(self) -> int:
        return compat.answer_tokens(self._engine)

    def _stat_loggers(self) -> list[Any]:
        loggers = [_recorder(self.statistics)]
        if "/metrics" not in self.open_routes:
            loggers.append(_no_metrics())
        return loggers

    def failure(self) -> str | None:
        """What is wrong with the engine for good: its process is dead, or makes no steps; None while it serves.

        To be asked every now and then: a step is owed from when requests were first seen.
        """
        if self._failed is not None:
            return self._failed
        if self._engine.errored:
            return "the engine's process is dead"
        now = time.monotonic()
        requests = self._engine.get_num_unfinished_requests()
        if not requests:
            self._idle_at = now
        stepped_at = self.statistics.stepped_at
        still_s = now - max(self._idle_at, stepped_at)
        if still_s > self._stall_timeout_s * (1 if stepped_at else FIRST_STEP_FACTOR):
            return f"no step for {still_s:.0f} s while {requests} requests run"
        return None

    def has_route(self, path: str) -> bool:
        """Whether vLLM's app has a route of this path, for any method; asked once the app is made."""
        return self._app is None or _has_route(self._app, path)

    def pop_token_counts(self, job_id: str) -> tuple[int, int] | None:
        """Return and forget the tokens in and out of a job that has ended.

        vLLM's request ids hold the job's: `chatcmpl-JOB-1a2b3c4d`, `cmpl-JOB-0-1a2b3c4d`.
        """
        finished = self.statistics.finished
        whole_id = re.compile(rf"(?:^|-){re.escape(job_id)}(?:-|$)")
        found = [finished.pop(request_id) for request_id in list(finished) if whole_id.search(request_id)]
        return (sum(tokens[0] for tokens in found), sum(tokens[1] for tokens in found)) if found else None

    async def app(self) -> App:
        """VLLM's OpenAI app, made at the first call, on the calling loop.

        Raises:
            ConfigurationError: vLLM cannot make it with these settings. The engine serves no jobs then (`failure`).
        """
        async with self._lock:
            if self._failed is not None:
                raise ConfigurationError(self._failed)
            if self._app is None:
                try:
                    self._app = await self._make_app()
                except Exception as error:
                    _log.debug("The app does not start", exc_info=error)
                    known = startup_errors.known(error, self._args.model, self._flags)
                    said = " ".join(redacted(described(error)).split())
                    self._failed = known or f"vLLM's app cannot be made: {said}"
                    raise ConfigurationError(self._failed) from error
            app: App = self._app
            return app

    async def _make_app(self) -> App:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._engine.get_supported_tasks()
        _find_adapters_of(tuple(self._args.served_model_name))
        app = build_app(self._args, tasks, self._engine.model_config)
        app.add_api_route("/cold_start", WORKER.document)
        if "/metrics" not in self.open_routes:
            compat.leave_out_middleware(app)
        await init_app_state(self._engine, app.state, self._args, tasks)
        compat.list_one_name(app.state)
        # vLLM's handler of a dead engine ends the server that it finds here; ours is ended by the loop.
        app.state.server = SimpleNamespace(should_exit=False)
        self._parses_chats = compat.parses_chats(app.state)
        # vLLM's periodic log line, a frozen heap. It ends with the loop.
        self._lifespan = await asgi.start(app)
        # A template that comes with a request may never end: the thread, which vLLM gives up then, is for it.
        if not self._args.trust_request_chat_template:
            compat.prepare_in_place(self._engine)
        for route in sorted(self._allowed_routes):
            if not _has_route(app, route):
                _log.warning("ALLOWED_ROUTES has %s, and vLLM's app has no such route with these settings", route)
        made: App = app
        return made

    def shutdown(self) -> None:
        """End the engine and its processes."""
        self._engine.shutdown(timeout=SHUTDOWN_TIMEOUT_S)


def _has_route(app: Any, path: str) -> bool:
    """Whether the app has a route of this path, or has something mounted there."""
    scopes = [{"type": "http", "method": "GET", "path": one, "root_path": ""} for one in (path, f"{path}/")]
    return any(route.matches(scope)[0] is not Match.NONE for route in app.routes for scope in scopes)


def _fork_processes() -> None:
    """Let vLLM fork its processes on a CPU too, where it would spawn them: each would import all of vLLM again.

    It spawns them for other libraries to be loaded first (`LD_PRELOAD`), and OpenMP to read its environment anew.
    Where these libraries are loaded already and OpenMP is GNU's, which can be told so later, forked ones do as well.
    """
    from vllm.platforms import current_platform

    preloaded = {
        os.path.realpath(path) for path in os.environ.get("LD_PRELOAD", "").replace(" ", ":").split(":") if path
    }
    openmp = next((path for path in preloaded if Path(path).name.startswith("libgomp")), None)
    if current_platform.is_cpu() and openmp is not None and preloaded <= _mapped():
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        library = ctypes.CDLL(openmp)
        os.register_at_fork(after_in_child=lambda: _bind_threads(library))


def _mapped() -> set[str]:
    """The files that are mapped into this process, its libraries among them."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) > 5}  # noqa: PLR2004 (proc_pid_maps(5))


def _bind_threads(openmp: ctypes.CDLL) -> None:
    """What OpenMP does with its environment as it is loaded, for a forked process: vLLM has set it for this one."""
    if cpus := os.environ.get("GOMP_CPU_AFFINITY"):
        os.sched_setaffinity(0, map(int, cpus.split()))
    if threads := os.environ.get("OMP_NUM_THREADS"):
        openmp.omp_set_num_threads(int(threads))


def _keep_media_public() -> None:
    """Let vLLM fetch media as `engine.backend.media` does; of the URL, vLLM checks `ALLOWED_MEDIA_DOMAINS`."""
    from vllm.connections import HTTPConnection
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

    class PublicConnection(HTTPConnection):  # type: ignore[misc]  # vLLM is not typed for --strict
        session: aiohttp.ClientSession | None = None

        def __init__(self, hosts: tuple[str, ...]) -> None:
            super().__init__()
            self.hosts = hosts

        async def get_async_client(self) -> aiohttp.ClientSession:
            self.session = self.session or public_session(VLLMValidationError, self.hosts)
            return self.session

        def get_sync_client(self) -> Any:
            raise VLLMValidationError("media is fetched asynchronously alone")

    connection = functools.cache(PublicConnection)

    @MEDIA_CONNECTOR_REGISTRY.register("http")
    class PublicMediaConnector(MediaConnector):  # type: ignore[misc]
        def __init__(self, *arguments: Any, allowed_media_domains: list[str] | None = None, **options: Any) -> None:
            options["connection"] = connection(tuple(allowed_media_domains or ()))
            super().__init__(*arguments, allowed_media_domains=allowed_media_domains, **options)


def _find_adapters_of(names: tuple[str, ...]) -> None:
    """Let vLLM find adapters that say any of the model's names for their base: it compares with its directory alone."""
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class OfAnyName(LoRAResolver):  # type: ignore[misc]  # vLLM is not typed for --strict
        def __init__(self, resolver: Any) -> None:
            self.resolver = resolver

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            path = PurePosixPath(lora_name)
            if path.is_absolute() or ".." in path.parts:
                return None  # A job's name is joined to the directory of adapters, and is not to leave it.
            for name in dict.fromkeys((base_model_name, *names)):
                if (found := await self.resolver.resolve_lora(name, lora_name)) is not None:
                    return found
            return None

    resolvers = LoRAResolverRegistry.resolvers
    resolvers.update({name: OfAnyName(resolver) for name, resolver in resolvers.items()})


def import_engine() -> None:
    """Import what the engine needs, which takes seconds; its forked processes have it then."""
    vllm_args.set_environment()
    for name in _ENGINE_MODULES:
        importlib.import_module(name)


def import_app() -> None:
    """Import what vLLM's OpenAI app needs beside that."""
    for name in _APP_MODULES:
        importlib.import_module(name)


def _no_metrics() -> Any:
    """In the place of vLLM's own metrics: they are looked up for each token, and no job can read them."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class NoMetrics(PrometheusStatLogger):  # type: ignore[misc]  # vLLM is not typed for --strict
        def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
            del vllm_config, engine_indexes

        def record(self, *_: Any, **__: Any) -> None:
            pass

        record_sleep_state = record_admission_rejection = log_engine_initialized = record

    return NoMetrics


def _recorder(statistics: Statistics) -> Any:
    """A factory, as vLLM wants it, of a logger for each engine that keeps `statistics` up to date."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Recorder(StatLoggerBase):  # type: ignore[misc]  # vLLM is not typed for --strict
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            del vllm_config
            self._engine = engine_index

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            del mm_cache_stats, engine_idx
            statistics.step(self._engine)
            if iteration_stats is not None:
                statistics.generation_tokens += iteration_stats.num_generation_tokens
                for request in iteration_stats.finished_requests:
                    statistics.finish(str(request.request_id), request.num_prompt_tokens, request.num_generation_tokens)
            if scheduler_stats is not None:
                statistics.load(
                    self._engine,
                    scheduler_stats.num_running_reqs,
                    scheduler_stats.num_waiting_reqs,
                    scheduler_stats.kv_cache_usage,
                )
            statistics.changed()

        def log_engine_initialized(self) -> None:
            pass

    return Recorder
