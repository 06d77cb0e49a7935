"""vLLM's engine and its OpenAI app in this process. Its arguments are in `engine.backend.vllm_args`.

It uses what `vllm serve` itself is made of. tests/integration/test_vllm_interface.py reports what an upgrade moves;
`engine.backend.compat` has the parts that vLLM does not promise.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import os
import re
from typing import TYPE_CHECKING, Any

from engine.backend import app as vllm_app
from engine.backend import compat, media, processes, startup_errors, stat_loggers, vllm_args
from engine.backend.files import Files
from engine.backend.ipc_directory import IPCDirectory
from engine.backend.routes import SERVING
from engine.backend.statistics import Statistics
from engine.backend.stream_interval import StreamInterval
from engine.config.redaction import redacted
from engine.errors import ConfigurationError, safe_str
from engine.run_clock import CLOCK

if TYPE_CHECKING:
    from engine.backend.app import App
    from engine.backend.configuration import Configuration
    from engine.telemetry.job_times import RequestStats

SHUTDOWN_TIMEOUT_S = 5.0
# The first step may compile kernels: it may take this many times longer than a later one.
FIRST_STEP_FACTOR = 5
_ENGINE_MODULES = (
    "vllm.engine.arg_utils",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
)
_APP_MODULES = ("vllm.entrypoints.launchers.app", "vllm.entrypoints.launchers.api_server.app_state")

_log = logging.getLogger(__name__)


class VLLMEngine:
    """vLLM's engine, loaded by the constructor, and its OpenAI app.

    The constructor is called before any event loop runs, and takes as long as the model needs to load. The app belongs
    to the event loop that first asks for it.

    Raises:
        ConfigurationError: vLLM does not accept the settings.
    """

    _app_error: str | None = None  # Why the app cannot be made; it is not tried again.

    def __init__(self, configuration: Configuration) -> None:
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        compat.check_version()
        compat.keep_deltas_separate()
        media.install_public_media_connector()
        self.statistics = Statistics(self._output_tokens)
        self.open_routes = SERVING | configuration.settings.allowed_routes
        self.files = _files(configuration)
        self._configuration = configuration
        self._stall_timeout_s = configuration.settings.engine_stall_timeout_s
        interval_ms = configuration.settings.batch_interval_ms
        self._interval = StreamInterval(None if interval_ms == "auto" else interval_ms / 1000)
        self._stream_interval_is_set = configuration.flags.value("stream_interval") is not None
        self._parses_chats = True
        start_method_is_set = processes.START_METHOD in os.environ  # vLLM's configuration for a CPU sets it as well.
        arguments, config = configuration.engine_config
        if not start_method_is_set:
            processes.prefer_fork()
        self._sockets = IPCDirectory()
        try:
            self._engine = AsyncLLM.from_vllm_config(
                config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=self._stat_loggers(),
                enable_log_requests=arguments.enable_log_requests,
                disable_log_stats=arguments.disable_log_stats,
            )
        except BaseException:
            self._sockets.close()
            raise
        self._idle_at = CLOCK.now()
        self._app: Any = None
        self._app_lock = asyncio.Lock()

    @property
    def max_model_len(self) -> int:
        """Maximum tokens of prompt and output together."""
        return int(self._engine.model_config.max_model_len)

    @property
    def max_num_seqs(self) -> int:
        """Maximum number of requests that the engine runs at once."""
        return int(self._engine.vllm_config.scheduler_config.max_num_seqs)

    @property
    def cache_tokens(self) -> int:
        """Capacity of the KV cache in tokens.

        It is vLLM's own count where it has one: where layers cache differently, the number of blocks times their size
        is too large.
        """
        cache = self._engine.vllm_config.cache_config
        if (tokens := getattr(cache, "kv_cache_size_tokens", None)) is not None:
            return int(tokens)
        return int((cache.num_gpu_blocks or 0) * cache.block_size)

    @property
    def batch_interval_s(self) -> float:
        """Minimum time between two outputs of a stream, in seconds, at the current load."""
        return self._interval.seconds(self.statistics.running)

    @property
    def exports_traces(self) -> bool:
        """Whether vLLM exports a span for each request (`--otlp-traces-endpoint`)."""
        return self._engine.vllm_config.observability_config.otlp_traces_endpoint is not None

    @property
    def device_attributes(self) -> dict[str, str | int]:
        """Name and number of the GPUs, for telemetry; `cpu` without any."""
        from vllm.platforms import current_platform

        return {
            "gpu.name": str(current_platform.get_device_name()),
            "gpu.count": int(self._engine.vllm_config.parallel_config.world_size_across_dp),
        }

    def event_tokens(self, path: str) -> int | None:
        """Return how many tokens vLLM should put into an event of a stream of plain text that starts now on this route.

        None where vLLM's parsers need each token as an event of its own.
        """
        if self._parses_chats and path == "/v1/chat/completions":
            return None
        if self._stream_interval_is_set:
            return 1
        return self._interval.tokens(self.statistics.running, self.statistics.step_s)

    def _output_tokens(self) -> int:
        return compat.output_tokens(self._engine)

    def _stat_loggers(self) -> list[Any]:
        loggers = [stat_loggers.recorder_of(self.statistics)]
        exports_metrics = self._configuration.settings.otel_exporter_otlp_endpoint is not None
        if "/metrics" not in self.open_routes and not exports_metrics:
            loggers.append(stat_loggers.no_metrics())
        return loggers

    def failure(self) -> str | None:
        """Return what is wrong with the engine for good: its process is dead, or makes no steps; None while it serves.

        Call it regularly: a step is expected from when unfinished requests were first seen.
        """
        if self._app_error is not None:
            return self._app_error
        if self._engine.errored:
            return "the engine's process is dead"
        now = CLOCK.now()
        requests = self._engine.get_num_unfinished_requests()
        if not requests:
            self._idle_at = now
        stepped_at = self.statistics.stepped_at
        stalled_s = now - max(self._idle_at, stepped_at)
        if stalled_s > self._stall_timeout_s * (1 if stepped_at else FIRST_STEP_FACTOR):
            return f"no step for {stalled_s:.0f} s while {requests} requests run"
        return None

    def has_route(self, path: str) -> bool:
        """Return whether vLLM's app has a route of this path, for any method; call it once the app is made."""
        return self._app is None or vllm_app.has_route(self._app, path)

    def pop_request_stats(self, job_id: str) -> list[RequestStats]:
        """Return and forget what vLLM says of a job's requests that have finished.

        vLLM's request ids contain the job's: `chatcmpl-JOB`, `cmpl-JOB-0`, and `chatcmpl-JOB_0` of a batch of chats.
        """
        finished = self.statistics.finished
        whole_id = re.compile(rf"(?:^|[-_]){re.escape(job_id)}(?:[-_]|$)")
        # The search for the text first: it is ten times faster, and most requests are of other jobs.
        request_ids = [one for one in finished if job_id in one and whole_id.search(one)]
        return [finished.pop(request_id) for request_id in request_ids]

    async def app(self) -> App:
        """Return vLLM's OpenAI app, made at the first call, on the calling event loop.

        Raises:
            ConfigurationError: vLLM cannot make it with these settings. The engine then serves no jobs (`failure`).
        """
        async with self._app_lock:
            if self._app_error is not None:
                raise ConfigurationError(self._app_error)
            if self._app is None:
                try:
                    self._app = await self._start_app()
                except Exception as error:
                    _log.debug("The app does not start", exc_info=error)
                    known = startup_errors.known(error, self._configuration.args.model, self._configuration.flags)
                    message = " ".join(redacted(safe_str(error)).split())
                    self._app_error = known or f"vLLM's app cannot be made: {message}"
                    raise ConfigurationError(self._app_error) from error
            app: App = self._app
            return app

    async def _start_app(self) -> Any:
        args = self._configuration.args
        app = await vllm_app.build_app(self._engine, args, with_metrics="/metrics" in self.open_routes)
        self._parses_chats = compat.parses_chats(app.state)
        # It runs vLLM's periodic log line and freezes the heap, until the event loop ends.
        self._lifespan = await vllm_app.run_lifespan(app)
        # A chat template that comes with a request may never end: vLLM's thread, which vLLM abandons then, is for that.
        if not args.trust_request_chat_template:
            compat.render_short_requests_inline(self._engine)
        for route in sorted(self.open_routes - SERVING):
            if not vllm_app.has_route(app, route):
                _log.warning("ALLOWED_ROUTES has %s, but vLLM's app has no such route with these settings", route)
        compat.cache_variables()
        return app

    def shutdown(self) -> None:
        """End the engine and its processes."""
        compat.forget_variables()
        try:
            self._engine.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
        finally:
            self._sockets.close()


def _files(configuration: Configuration) -> Files:
    from vllm import envs

    hosts = configuration.args.allowed_media_domains or ()
    return Files(
        configuration.settings.network_volume,
        envs.VLLM_MAX_AUDIO_CLIP_FILESIZE_MB * 2**20,
        "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB",
        functools.partial(media.download, hosts=hosts),
    )


def import_engine() -> None:
    """Import what the engine needs, which takes seconds; its forked processes then have it too."""
    vllm_args.set_environment()
    for name in _ENGINE_MODULES:
        importlib.import_module(name)
    compat.cli_args()


def import_app() -> None:
    """Import what vLLM's OpenAI app needs in addition."""
    for name in _APP_MODULES:
        importlib.import_module(name)
