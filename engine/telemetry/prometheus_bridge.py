"""Adds vLLM's Prometheus metrics, under their own names, to what is exported."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from opentelemetry.sdk.metrics import Histogram, ObservableCounter
from opentelemetry.sdk.metrics import export as data
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

PREFIX = "vllm:"
_CUMULATIVE, _DELTA = data.AggregationTemporality.CUMULATIVE, data.AggregationTemporality.DELTA


class WithVLLMsMetrics(data.MetricExporter):
    """An exporter that sends vLLM's metrics with the worker's own.

    Args:
        exporter: sends them.
        registry: of Prometheus' client; what is in it for another purpose is left out.
    """

    def __init__(self, exporter: data.MetricExporter, registry: Any = REGISTRY) -> None:
        # What the base class keeps for the reader, as the exporter has it.
        super().__init__(exporter._preferred_temporality, exporter._preferred_aggregation)  # noqa: SLF001
        self._exporter = exporter
        self._registry = registry
        self._started_ns = time.time_ns()
        preferred = self._preferred_temporality or {}
        self._differences: dict[type, Differences] = {
            kind: Differences()
            for kind, instrument in ((data.Sum, ObservableCounter), (data.Histogram, Histogram))
            if preferred.get(instrument) == _DELTA
        }

    def export(
        self, metrics_data: data.MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> data.MetricExportResult:
        """Send the metrics."""
        if metrics_data.resource_metrics:
            own = metrics_data.resource_metrics[0]
            families = [one for one in self._registry.collect() if one.name.startswith(PREFIX)]
            totals = metrics(families, self._started_ns)
            vllms = data.ScopeMetrics(InstrumentationScope("vllm"), [self._as_preferred(one) for one in totals], "")
            resource = data.ResourceMetrics(own.resource, [*own.scope_metrics, vllms], own.schema_url)
            metrics_data = data.MetricsData([resource])
        return self._exporter.export(metrics_data, timeout_millis, **kwargs)

    def _as_preferred(self, metric: data.Metric) -> data.Metric:
        differences = self._differences.get(type(metric.data))
        return metric if differences is None else differences.since_last(metric)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """End the exporter."""
        self._exporter.shutdown(timeout_millis, **kwargs)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Send what is left."""
        return self._exporter.force_flush(timeout_millis)


class Differences:
    """Turns totals into what they have gained since the last export, for a collector that wants that (`delta`)."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, frozenset[tuple[str, Any]]], Any] = {}

    def since_last(self, metric: data.Metric) -> data.Metric:
        """Return a metric with what its points have gained."""
        totals: Any = metric.data
        points = [self._gained(metric.name, point) for point in totals.data_points]
        return replace(metric, data=replace(totals, data_points=points, aggregation_temporality=_DELTA))

    def _gained(self, name: str, point: Any) -> Any:
        key = (name, frozenset(point.attributes.items()))
        last, self._last[key] = self._last.get(key), point
        if last is None:
            return point
        gained: dict[str, Any] = {"start_time_unix_nano": last.time_unix_nano}
        if isinstance(point, data.NumberDataPoint):
            gained["value"] = point.value - last.value
        else:
            pairs = zip(point.bucket_counts, last.bucket_counts, strict=True)
            gained["bucket_counts"] = [count - before for count, before in pairs]
            gained |= {"count": point.count - last.count, "sum": point.sum - last.sum}
        return replace(point, **gained)


def metrics(families: Iterable[Metric], started_ns: int) -> Iterator[data.Metric]:
    """Return Prometheus metrics as OpenTelemetry's; those of other types than these three are left out."""
    now_ns = time.time_ns()
    for family in families:
        if family.type == "histogram":
            points: Any = data.Histogram(_histogram_points(family.samples, started_ns, now_ns), _CUMULATIVE)
        elif family.type == "counter":
            numbers = _number_points(family.samples, f"{family.name}_total", started_ns, now_ns)
            points = data.Sum(numbers, _CUMULATIVE, is_monotonic=True)
        elif family.type == "gauge":
            points = data.Gauge(_number_points(family.samples, family.name, started_ns, now_ns))
        else:
            continue
        yield data.Metric(family.name, family.documentation, family.unit, points)


def _number_points(samples: Iterable[Sample], name: str, started_ns: int, now_ns: int) -> list[data.NumberDataPoint]:
    return [
        data.NumberDataPoint(dict(sample.labels), started_ns, now_ns, sample.value)
        for sample in samples
        if sample.name == name
    ]


def _histogram_points(samples: Iterable[Sample], started_ns: int, now_ns: int) -> list[data.HistogramDataPoint]:
    """Return a point for each set of labels. Prometheus' buckets count all values up to a bound."""
    buckets: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = defaultdict(list)
    sums: dict[tuple[tuple[str, str], ...], float] = {}
    for sample in samples:
        labels = tuple(sorted((name, text) for name, text in sample.labels.items() if name != "le"))
        if sample.name.endswith("_bucket"):
            buckets[labels].append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_sum"):
            sums[labels] = sample.value
    points = []
    for labels, found in buckets.items():
        found.sort()
        up_to = [0.0, *(count for _, count in found)]
        counts = [int(count - before) for before, count in pairwise(up_to)]
        bounds = [bound for bound, _ in found[:-1]]
        total = sums.get(labels, 0.0)
        points.append(
            data.HistogramDataPoint(
                dict(labels), started_ns, now_ns, sum(counts), total, counts, bounds, float("nan"), float("nan")
            )
        )
    return points
