"""vLLM's interface for statistics: one logger that records the load, one that records nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.telemetry.job_times import RequestStats

if TYPE_CHECKING:
    from engine.backend.statistics import Statistics


def recorder_of(statistics: Statistics) -> Any:
    """Return a factory, as vLLM expects it, of a logger for each engine that updates `statistics`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Recorder(StatLoggerBase):  # type: ignore[misc]  # vLLM is not typed for --strict
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            del vllm_config
            self._engine = engine_index

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            del mm_cache_stats, engine_idx
            statistics.on_step(self._engine)
            if iteration_stats is not None:
                statistics.generation_tokens += iteration_stats.num_generation_tokens
                for request in iteration_stats.finished_requests:
                    stats = RequestStats(
                        request.num_prompt_tokens,
                        request.num_generation_tokens,
                        request.queued_time,
                        request.prefill_time,
                        request.decode_time,
                    )
                    statistics.on_finished(str(request.request_id), stats)
            if scheduler_stats is not None:
                statistics.on_scheduler_stats(
                    self._engine,
                    scheduler_stats.num_running_reqs,
                    scheduler_stats.num_waiting_reqs,
                    scheduler_stats.kv_cache_usage,
                )
            statistics.changed.set()

        def log_engine_initialized(self) -> None:
            pass

    return Recorder


def no_metrics() -> Any:
    """Return a logger that replaces vLLM's Prometheus metrics: they cost time for each token, and no job reads them."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class NullPrometheusLogger(PrometheusStatLogger):  # type: ignore[misc]  # vLLM is not typed for --strict
        def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
            del vllm_config, engine_indexes

        def record(self, *_: Any, **__: Any) -> None:
            pass

        record_sleep_state = record_admission_rejection = log_engine_initialized = record

    return NullPrometheusLogger
