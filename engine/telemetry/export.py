"""Exports traces, metrics and logs by OTLP. Imported only if an endpoint is set.

Nothing waits for a collector: jobs that have ended go into a bounded queue, twice a second a thread makes spans and
metrics of them, and OpenTelemetry's own threads send them in batches, from bounded queues. What is too much is dropped
and counted.
Batches, intervals, headers and limits are set by OpenTelemetry's own variables (`OTEL_BSP_*`, `OTEL_METRIC_*`, …).
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision

from engine.telemetry.counters import COUNTERS
from engine.telemetry.log_handler import LogHandler
from engine.telemetry.metrics import Metrics
from engine.telemetry.otlp_variables import SIGNALS
from engine.telemetry.prometheus_bridge import WithVLLMsMetrics
from engine.telemetry.spans import JobIds, Spans, parent_context

if TYPE_CHECKING:
    from engine.cold_start import ColdStart
    from engine.telemetry.costs import Costs
    from engine.telemetry.engine_load import EngineLoad
    from engine.telemetry.job_times import JobTimes

SERVICE_NAME = "vllm-serverless"
# Jobs that have ended and wait for the thread.
MAX_WAITING_JOBS = 4096
_ADD_INTERVAL_S = 0.5
_LOGGERS = ("engine", "vllm")
_PREFIX = "OTEL_EXPORTER_OTLP"
_HISTOGRAMS = f"{_PREFIX}_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
_EXPORTERS = {
    "traces": ("trace_exporter", "OTLPSpanExporter"),
    "metrics": ("metric_exporter", "OTLPMetricExporter"),
    "logs": ("_log_exporter", "OTLPLogExporter"),
}
_OWN_METRICS = "OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED"

_log = logging.getLogger(__name__)


class Export:
    """The worker's telemetry, on its way to a collector.

    Args:
        endpoint: of the collector, as `OTEL_EXPORTER_OTLP_ENDPOINT` has it.
        attributes: of the worker, which all that it sends has.
        costs: of the worker.
        load: of the engine.
        engine_is_traced: whether vLLM exports spans of its own.
        variables: OpenTelemetry's own.
    """

    def __init__(  # noqa: PLR0913 (all that is exported)
        self,
        endpoint: str,
        attributes: Mapping[str, str | int],
        costs: Costs,
        load: EngineLoad,
        *,
        engine_is_traced: bool = False,
        variables: Mapping[str, str] = os.environ,
    ) -> None:
        # What the SDK drops, it counts in metrics of its own.
        os.environ.setdefault(_OWN_METRICS, "true")
        given = OTELResourceDetector().detect()  # OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME
        resource = Resource.create({"service.name": SERVICE_NAME, **attributes}).merge(given)
        exporters = _Exporters(endpoint, variables)
        signals = _wanted_signals(variables)
        readers = []
        if "metrics" in signals:
            readers.append(PeriodicExportingMetricReader(WithVLLMsMetrics(exporters.of("metrics"))))
        self._meters = MeterProvider(readers, resource, shutdown_on_exit=False)
        ids = JobIds()
        self._exports_traces = "traces" in signals
        # Only the processors count what they drop: counting each span would cost as much as making it.
        self._traces = TracerProvider(resource=resource, id_generator=ids, shutdown_on_exit=False)
        if self._exports_traces:
            self._traces.add_span_processor(BatchSpanProcessor(exporters.of("traces"), meter_provider=self._meters))
        self._logs = LoggerProvider(resource, shutdown_on_exit=False)
        self._engine_is_traced = engine_is_traced
        self._costs = costs
        self._spans = Spans(self._traces.get_tracer(SERVICE_NAME), ids)
        self._metrics = Metrics(self._meters.get_meter(SERVICE_NAME), costs, load)
        self._handler = LogHandler(self._logs)
        if "logs" in signals:
            self._logs.add_log_record_processor(
                BatchLogRecordProcessor(exporters.of("logs"), meter_provider=self._meters)
            )
            for name in _LOGGERS:
                logging.getLogger(name).addHandler(self._handler)
        self._waiting: deque[JobTimes] = deque()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._add_jobs, name="telemetry of jobs", daemon=True)
        self._thread.start()
        _log.info("Telemetry goes to %s: %s", endpoint, ", ".join(sorted(signals)) or "nothing")

    def cold_start_ended(self, cold_start: ColdStart) -> None:
        """Export the phases of the worker's start."""
        if self._exports_traces:
            self._spans.add_cold_start(cold_start)

    def job_started(self, times: JobTimes) -> None:
        """Make vLLM's spans of a job that starts a part of its trace."""
        times.has_span, times.engine_is_traced = self._exports_traces, self._engine_is_traced
        times.is_recorded = self._is_recorded

    def _is_recorded(self, times: JobTimes) -> bool:
        sampled = self._traces.sampler.should_sample(parent_context(times), times.trace_id, "job")
        return times.is_sampled and sampled.decision is Decision.RECORD_AND_SAMPLE

    def job_ended(self, times: JobTimes) -> None:
        """Export a job that has ended, later. The thread is not woken: the event loop would wait for the GIL."""
        if len(self._waiting) < MAX_WAITING_JOBS:
            self._waiting.append(times)
        else:
            COUNTERS.dropped += 1

    def shutdown(self, timeout_s: float) -> None:
        """Send what is left; give up what a collector does not take within so many seconds."""
        until = time.monotonic() + timeout_s
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
        self._ending.set()
        self._thread.join(timeout_s)
        # One after another, a collector that hangs would cost the others their time.
        ends: list[Callable[[], Any]] = [self._traces.shutdown, self._meters.shutdown, self._logs.shutdown]
        if self._engine_is_traced:  # vLLM's provider is the global one; the worker's exit leaves out its own flush.
            vllms: Any = trace.get_tracer_provider()
            ends.append(vllms.force_flush)
        threads = [threading.Thread(target=end, name="end of telemetry", daemon=True) for end in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0))

    def _add_jobs(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ending.wait(_ADD_INTERVAL_S)
            while self._waiting:
                self._add_job(self._waiting.popleft())
                time.sleep(0)  # Let the event loop have the GIL.

    def _add_job(self, times: JobTimes) -> None:
        try:
            self._metrics.add_job(times)
            if self._exports_traces:
                self._spans.add_job(times, self._costs.document(times))
        except Exception:  # noqa: BLE001 (the next job's telemetry may be better)
            _log.exception("Job %s: its telemetry could not be made", times.job_id)


class _Exporters:
    """Makes the exporter of each signal, by HTTP (`http/protobuf`, OpenTelemetry's default) or gRPC (`grpc`)."""

    def __init__(self, endpoint: str, variables: Mapping[str, str]) -> None:
        self._endpoint = endpoint
        self._variables = variables

    def of(self, signal: str) -> Any:
        own = f"{_PREFIX}_{signal.upper()}"
        protocol = self._variables.get(f"{own}_PROTOCOL") or self._variables.get(f"{_PREFIX}_PROTOCOL")
        is_grpc = protocol == "grpc"
        # The variable of the signal is a whole URL. It is read here: vLLM sets that of traces.
        url = self._variables.get(f"{own}_ENDPOINT") or (
            self._endpoint if is_grpc else f"{self._endpoint.rstrip('/')}/v1/{signal}"
        )
        return _exporter_class(signal, is_grpc=is_grpc)(
            endpoint=url, **(self._metric_options() if signal == "metrics" else {})
        )

    def _metric_options(self) -> dict[str, Any]:
        if self._variables.get(_HISTOGRAMS):
            return {}
        return {"preferred_aggregation": {Histogram: ExponentialBucketHistogramAggregation()}}


def _exporter_class(signal: str, *, is_grpc: bool) -> Any:
    module, name = _EXPORTERS[signal]
    package = f"opentelemetry.exporter.otlp.proto.{'grpc' if is_grpc else 'http'}"
    return getattr(importlib.import_module(f"{package}.{module}"), name)


def _wanted_signals(variables: Mapping[str, str]) -> set[str]:
    if variables.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return set()
    return {name for name in SIGNALS if variables.get(f"OTEL_{name.upper()}_EXPORTER", "").lower() != "none"}
