"""The worker's own metrics. vLLM's are added as they are (`engine.telemetry.prometheus_bridge`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from opentelemetry.metrics import CallbackOptions, Observation

from engine.telemetry.counters import COUNTERS, Counters
from engine.telemetry.semantics import metric_attributes

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, Meter

    from engine.telemetry.costs import Costs
    from engine.telemetry.engine_load import EngineLoad
    from engine.telemetry.job_times import JobTimes

# Bounds of explicit buckets, in seconds; OpenTelemetry's default ones are for milliseconds. The first three are of the
# semantic conventions: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics
_DURATION_S = [0.01 * 2**power for power in range(14)]
_FIRST_OUTPUT_S = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]
_PER_TOKEN_S = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]
_QUEUE_S = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0]
_DELIVERY_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
# What is last known, not a sum.
_GAUGES = {"slots"}
_DESCRIPTIONS = {
    "takes": "Polls for jobs",
    "failed_takes": "Polls for jobs that have failed",
    "jobs_taken": "Jobs that were started",
    "full": "Times that no job was taken as the engine had no room",
    "slots": "Jobs that the engine has room for",
    "deliveries": "Outputs and results that were delivered",
    "retries": "Deliveries that were tried again",
    "refused": "Outputs and results that the platform has refused",
    "lost": "Jobs that ended without a delivered result",
    "drains": "Times that the worker was asked to stop",
    "dropped": "Jobs whose telemetry was dropped, as the export was too slow",
}


class Metrics:
    """Records what jobs report at their end; the rest is read when metrics are exported.

    Args:
        meter: makes the instruments.
        costs: of the worker.
        load: of the engine.
    """

    def __init__(self, meter: Meter, costs: Costs, load: EngineLoad) -> None:
        self._duration = _histogram(
            meter,
            "gen_ai.server.request.duration",
            "From the take of a job to the end of its last delivery",
            _DURATION_S,
        )
        self._first_output = _histogram(
            meter,
            "gen_ai.server.time_to_first_token",
            "From the take of a job to a stream's first output; of other answers, the engine's time to the first token",
            _FIRST_OUTPUT_S,
        )
        self._per_token = _histogram(
            meter, "gen_ai.server.time_per_output_token", "Time for each output token after the first", _PER_TOKEN_S
        )
        self._queue = _histogram(meter, "worker.job.queue.duration", "Time in the platform's queue", _QUEUE_S)
        self._delivery = _histogram(meter, "worker.delivery.duration", "Duration of one delivery", _DELIVERY_S)
        for field in fields(Counters):
            _observe_counter(meter, field.name)
        _observe(meter.create_observable_gauge, "worker.engine.running", "{request}", lambda: load.running)
        _observe(meter.create_observable_gauge, "worker.engine.waiting", "{request}", lambda: load.waiting)
        _observe(meter.create_observable_gauge, "worker.engine.kv_cache.usage", "1", lambda: load.kv_cache_usage)
        meter.create_observable_counter(
            "worker.seconds",
            [lambda _: _worker_seconds(costs)],
            "s",
            "Seconds of the worker's life: its start and idle time, if nobody's, and the jobs'",
        )
        meter.create_observable_counter(
            "worker.jobs.seconds", [lambda _: _sums(costs, "worker_s")], "s", "Worker seconds of jobs, by model"
        )
        meter.create_observable_counter(
            "worker.jobs.start.seconds", [lambda _: _sums(costs, "start_s")], "s", "Seconds of the start, by model"
        )
        meter.create_observable_counter(
            "worker.jobs.tokens", [lambda _: _tokens(costs)], "{token}", "Tokens of jobs, by model"
        )
        self._jobs = meter.create_counter("worker.jobs", "{job}", "Jobs that have ended, by outcome and model")
        if costs.price_per_second is not None:
            price = costs.price_per_second
            meter.create_observable_counter(
                "worker.cost",
                [lambda _: (Observation(price * one.value, one.attributes) for one in _worker_seconds(costs))],
                "1",
                "What the worker's seconds have cost, in the currency of PRICE_PER_SECOND",
            )

    def add_job(self, times: JobTimes) -> None:
        """Record a job that has ended."""
        attributes = metric_attributes(times)
        self._jobs.add(1, {"outcome": times.outcome, "gen_ai.request.model": times.served_model})
        self._duration.record(times.duration_s, attributes)
        if times.outcome == "completed" and times.first_token_s is not None:
            self._first_output.record(times.first_token_s, attributes)
        for request in times.requests:
            if request.output_tokens > 1:
                self._per_token.record(request.decode_s / (request.output_tokens - 1), attributes)
        if times.queue_s is not None:
            self._queue.record(times.queue_s)
        for begun_at, ended_at in times.deliveries:
            self._delivery.record(ended_at - begun_at)


def _histogram(meter: Meter, name: str, description: str, bounds_s: Sequence[float]) -> Histogram:
    return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=bounds_s)


def _observe_counter(meter: Meter, name: str) -> None:
    create = meter.create_observable_gauge if name in _GAUGES else meter.create_observable_counter
    unit = "{job}" if name in _GAUGES else "1"
    _observe(create, f"worker.{name}", unit, lambda: getattr(COUNTERS, name), _DESCRIPTIONS[name])


def _observe(
    create: Callable[..., object], name: str, unit: str, read: Callable[[], float], description: str = ""
) -> None:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        yield Observation(read())

    create(name, [observe], unit, description)


def _worker_seconds(costs: Costs) -> Iterable[Observation]:
    totals = costs.seconds.totals()
    for kind, seconds in (("start", totals.start_s), ("idle", totals.idle_s), ("jobs", totals.jobs_s)):
        yield Observation(seconds, {"kind": kind})


def _sums(costs: Costs, name: str) -> Iterable[Observation]:
    for model, sums in list(costs.by_model.items()):
        yield Observation(getattr(sums, name), {"gen_ai.request.model": model})


def _tokens(costs: Costs) -> Iterable[Observation]:
    for model, sums in list(costs.by_model.items()):
        for kind, tokens in (("input", sums.prompt_tokens), ("output", sums.output_tokens)):
            yield Observation(tokens, {"gen_ai.request.model": model, "gen_ai.token.type": kind})
