"""Telemetry through OpenTelemetry's own exporters, over HTTP, to a collector that decodes it."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import grpc
import pytest
from opentelemetry import trace
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from bench.collector import OTLPReceiver, attributes, receiving
from engine.backend.statistics import Statistics
from engine.backend.vllm_engine import VLLMEngine
from engine.cold_start import ColdStart
from engine.config.settings import Settings
from engine.run_clock import CLOCK
from engine.telemetry.costs import Costs
from engine.telemetry.counters import COUNTERS
from engine.telemetry.export import Export
from engine.telemetry.job_times import CURRENT, JobTimes, RequestStats, is_traceparent
from engine.worker import Worker
from tests.grpc_collector import receiving_grpc
from tests.scripted_worker import ScriptedEngine
from tests.unit.queue.fakes import LoopHarness

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def receiver() -> Iterator[OTLPReceiver]:
    with receiving() as one:
        yield one


@contextmanager
def exporting(receiver: OTLPReceiver, costs: Costs | None = None, **options: Any) -> Iterator[Export]:
    """Export during the block, and send what is left at its end."""
    statistics = Statistics()
    statistics.on_scheduler_stats(0, 3, 1, 0.25)
    export = Export(
        receiver.url,
        {"service.instance.id": "worker-1", "gpu.name": "H100"},
        costs or Costs(CLOCK.now()),
        statistics,
        **{"variables": {}, **options},
    )
    try:
        yield export
    finally:
        export.shutdown(10.0)


def ended_job(costs: Costs, **fields: Any) -> JobTimes:
    """Return the times of a job that waited 2 s, ran for 1 s and was delivered twice."""
    now, wall_s = CLOCK.now(), time.time()
    times = JobTimes("job-1", submitted_at_s=wall_s - 3.0, taken_at=now - 1.0, taken_at_s=wall_s - 1.0, **fields)
    costs.begin(times)
    times.first_output_at = now - 0.8
    times.deliveries += [(now - 0.7, now - 0.6), (now - 0.1, now)]
    times.delivery_count, times.delivery_s = 2, 0.2
    times.requests.append(RequestStats(10, 5, 0.1, 0.2, 0.4, finished_at=now - 0.2))
    times.ended_at, times.outcome = now, "completed"
    costs.end(times)
    return times


def test_a_jobs_spans_are_a_part_of_its_clients_trace(receiver: OTLPReceiver) -> None:
    costs = Costs(CLOCK.now(), 0.5)
    with exporting(receiver, costs) as export:
        times = ended_job(costs, model="tiny", route="/v1/chat/completions")
        export.job_started(times)
        times.join(TRACEPARENT)
        export.job_ended(times)

    spans = receiver.spans
    root = next(span for span in spans if span.name == "job")
    assert {span.trace_id.hex() for span in spans} == {TRACEPARENT[3:35]}
    assert root.parent_span_id.hex() == TRACEPARENT[36:52]
    assert root.span_id.hex() == f"{times.span_id:016x}"
    assert {span.parent_span_id for span in spans if span is not root} == {root.span_id}
    durations_s = {span.name: (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 for span in spans}
    assert durations_s == pytest.approx(
        {"job": 3.0, "queue": 2.0, "engine queue": 0.1, "prefill": 0.2, "decode": 0.4, "deliver": 0.1}, abs=1e-3
    )
    given = attributes(root)
    assert (given["gen_ai.operation.name"], given["gen_ai.request.model"]) == ("chat", "tiny")
    assert (given["gen_ai.usage.input_tokens"], given["gen_ai.usage.output_tokens"]) == (10, 5)
    assert {"worker.job.worker_s", "worker.job.cost"} <= given.keys()
    resource = receiver.resource()
    assert (resource["service.name"], resource["gpu.name"]) == ("vllm-serverless", "H100")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (TRACEPARENT, True),
        (f"cc{TRACEPARENT[2:]}", True),
        (f"cc{TRACEPARENT[2:]}-more", True),
        (f"cc{TRACEPARENT[2:]}more", False),
        (f"{TRACEPARENT}-more", False),
        (f"ff{TRACEPARENT[2:]}", False),
        (TRACEPARENT.upper(), False),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", False),
        (f"00-{'1' * 32}-{'0' * 16}-01", False),
        (f"{TRACEPARENT}\n", False),
        (5, False),
    ],
)
def test_a_traceparent_has_the_form_of_this_or_a_later_version(text: object, is_one: bool) -> None:
    assert is_traceparent(text) == is_one
    if is_one:
        times = JobTimes("job-1")
        times.join(str(text))
        assert times.traceparent == TRACEPARENT
        assert times.is_sampled


def test_a_trace_that_its_client_does_not_record_gets_no_spans(receiver: OTLPReceiver) -> None:
    costs = Costs(CLOCK.now())
    with exporting(receiver, costs) as export:
        times = ended_job(costs)
        times.join(TRACEPARENT[:-2] + "00")
        export.job_ended(times)

    assert receiver.spans == []


def test_opentelemetrys_sampler_applies(receiver: OTLPReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    costs = Costs(CLOCK.now())
    with exporting(receiver, costs) as export:
        export.job_ended(ended_job(costs))

    assert receiver.spans == []
    assert "worker.jobs" in receiver.metrics


def test_vllms_spans_of_a_request_join_the_jobs(receiver: OTLPReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs(CLOCK.now())
    vllms = Mock()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: vllms)
    with exporting(receiver, costs, engine_is_traced=True) as export:
        times = JobTimes("job-1")
        assert times.engine_traceparent is None
        export.job_started(times)
        assert times.engine_traceparent == f"00-{times.trace_id:032x}-{times.span_id:016x}-01"
        times.join(TRACEPARENT)
        assert times.engine_traceparent == f"{TRACEPARENT[:36]}{times.span_id:016x}-01"

    vllms.force_flush.assert_called_once()


def test_vllms_spans_are_not_recorded_where_the_jobs_is_not(
    receiver: OTLPReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    monkeypatch.setattr(trace, "get_tracer_provider", Mock)
    with exporting(receiver, engine_is_traced=True) as export:
        own, clients = JobTimes("job-1"), JobTimes("job-2")
        for times in (own, clients):
            export.job_started(times)
        clients.join(TRACEPARENT)
        assert (own.engine_traceparent or "")[-2:] == "00"
        assert (clients.engine_traceparent or "")[-2:] == "01"


def test_the_start_is_a_trace_that_the_job_it_was_for_links_to(receiver: OTLPReceiver) -> None:
    cold_start = ColdStart(time.monotonic() - 10.0)
    for phase in ("imports", "engine", "app"):
        cold_start.mark(phase)
    costs = Costs(cold_start.started_at)
    costs.seconds.ready()
    with exporting(receiver, costs) as export:
        export.cold_start_ended(cold_start)
        export.job_ended(ended_job(costs))

    spans = {span.name: span for span in receiver.spans}
    start = spans["cold start"]
    assert (start.end_time_unix_nano - start.start_time_unix_nano) / 1e9 == pytest.approx(10.0, abs=0.1)
    assert {spans[name].parent_span_id for name in ("imports", "engine", "app")} == {start.span_id}
    assert [link.span_id for link in spans["job"].links] == [start.span_id]


def test_metrics_have_what_jobs_took_and_what_the_worker_did(receiver: OTLPReceiver) -> None:
    costs = Costs(CLOCK.now() - 5.0, 0.5)
    costs.seconds.ready()
    with exporting(receiver, costs) as export:
        export.job_ended(ended_job(costs, model="tiny", route="/v1/chat/completions"))

    metrics = receiver.metrics
    point = metrics["gen_ai.server.request.duration"].exponential_histogram.data_points[0]
    assert (point.count, point.sum) == (1, pytest.approx(1.0, abs=0.01))
    assert attributes(point)["gen_ai.request.model"] == "tiny"
    assert metrics["worker.delivery.duration"].exponential_histogram.data_points[0].count == 2
    assert metrics["worker.job.queue.duration"].exponential_histogram.data_points[0].sum == pytest.approx(2.0, abs=0.1)
    seconds = {attributes(one)["kind"]: one.as_double for one in metrics["worker.seconds"].sum.data_points}
    assert set(seconds) == {"start", "idle", "jobs"}
    assert metrics["worker.engine.kv_cache.usage"].gauge.data_points[0].as_double == 0.25
    tokens = {attributes(one)["gen_ai.token.type"]: one.as_int for one in metrics["worker.jobs.tokens"].sum.data_points}
    assert tokens == {"input": 10, "output": 5}
    assert {"worker.takes", "worker.retries", "worker.lost", "worker.drains", "worker.cost"} <= metrics.keys()


def test_vllms_metrics_have_their_own_names(receiver: OTLPReceiver) -> None:
    counter = Counter("vllm:prompt_tokens", "Tokens", ["model_name"])
    counter.labels("tiny").inc(7)
    gauge = Gauge("vllm:num_requests_running", "Requests")
    gauge.set(3)
    histogram = Histogram("vllm:time_to_first_token_seconds", "TTFT", buckets=(0.1, 1.0))
    for value in (0.05, 0.5, 0.6, 5.0):
        histogram.observe(value)
    try:
        with exporting(receiver):
            pass
    finally:
        for one in (counter, gauge, histogram):
            REGISTRY.unregister(one)

    metrics = receiver.metrics
    (tokens,) = metrics["vllm:prompt_tokens"].sum.data_points
    assert (tokens.as_double, attributes(tokens)) == (7.0, {"model_name": "tiny"})
    assert metrics["vllm:num_requests_running"].gauge.data_points[0].as_double == 3.0
    (point,) = metrics["vllm:time_to_first_token_seconds"].histogram.data_points
    assert (list(point.bucket_counts), list(point.explicit_bounds)) == ([1, 2, 1], [0.1, 1.0])
    assert (point.count, point.sum) == (4, pytest.approx(6.15))
    assert not [name for name in metrics if name.startswith("python_")]


@pytest.mark.parametrize(("is_stream", "expected_s"), [(True, 0.2), (False, 0.3)])
def test_the_time_to_the_first_token_of_an_answer_in_one_piece_is_the_engines(
    receiver: OTLPReceiver, is_stream: bool, expected_s: float
) -> None:
    """A failed job has none."""
    costs = Costs(CLOCK.now())
    with exporting(receiver, costs) as export:
        export.job_ended(ended_job(costs, is_stream=is_stream))
        failed = ended_job(costs, is_stream=is_stream)
        failed.outcome = "failed"
        export.job_ended(failed)

    (point,) = receiver.metrics["gen_ai.server.time_to_first_token"].exponential_histogram.data_points
    assert (point.count, point.sum) == (1, pytest.approx(expected_s, abs=0.01))


def test_explicit_buckets_are_for_seconds(receiver: OTLPReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
    monkeypatch.setenv(name, "explicit_bucket_histogram")
    costs = Costs(CLOCK.now())
    with exporting(receiver, costs, variables={name: "explicit_bucket_histogram"}) as export:
        export.job_ended(ended_job(costs))

    for metric in ("gen_ai.server.request.duration", "worker.job.queue.duration", "worker.delivery.duration"):
        (point,) = receiver.metrics[metric].histogram.data_points
        assert point.explicit_bounds[0] <= 0.1
        assert not point.bucket_counts[0]


def test_vllms_counts_are_differences_if_the_collector_wants_them(
    receiver: OTLPReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "delta")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    counter, gauge = Counter("vllm:prompt_tokens", "Tokens"), Gauge("vllm:num_requests_running", "Requests")
    histogram = Histogram("vllm:time_to_first_token_seconds", "TTFT", buckets=(0.1, 1.0))
    counter.inc(7)
    gauge.set(3)
    histogram.observe(0.05)
    try:
        with exporting(receiver):
            while "vllm:prompt_tokens" not in receiver.metrics:
                time.sleep(0.01)
            counter.inc(5)
            histogram.observe(0.5)
    finally:
        for one in (counter, gauge, histogram):
            REGISTRY.unregister(one)

    assert receiver.metrics["vllm:prompt_tokens"].sum.aggregation_temporality == 1
    counts = [metric.sum.data_points[0].as_double for metric in receiver.all_of("vllm:prompt_tokens")]
    assert [count for count in counts if count] == [7.0, 5.0]
    points = [one.histogram.data_points[0] for one in receiver.all_of("vllm:time_to_first_token_seconds")]
    assert [list(point.bucket_counts) for point in points if point.count] == [[1, 0, 0], [0, 1, 0]]
    assert sum(point.sum for point in points) == pytest.approx(0.55)
    assert points[1].start_time_unix_nano == points[0].time_unix_nano
    assert receiver.metrics["vllm:num_requests_running"].gauge.data_points[0].as_double == 3.0


def test_attributes_of_the_user_replace_the_workers(receiver: OTLPReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=chat,deployment.environment.name=test")
    costs = Costs(CLOCK.now())
    with exporting(receiver, costs) as export:
        export.job_ended(ended_job(costs))

    resource = receiver.resource()
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("chat", "test")
    assert resource["service.instance.id"] == "worker-1"


@pytest.mark.parametrize("signal", ["traces", "metrics", "logs"])
def test_a_signal_that_is_not_wanted_is_not_sent(receiver: OTLPReceiver, signal: str) -> None:
    costs = Costs(CLOCK.now())
    with exporting(receiver, costs, variables={f"OTEL_{signal.upper()}_EXPORTER": "none"}) as export:
        times = ended_job(costs)
        export.job_started(times)
        export.job_ended(times)
        export.cold_start_ended(ColdStart(time.monotonic()))
        logging.getLogger("engine.queue.job_loop").warning("a line")

    sent = {path.rpartition("/")[2] for path, requests in receiver.requests.items() if requests}
    assert sent == {"traces", "metrics", "logs"} - {signal}
    assert times.has_span == (signal != "traces")


@pytest.mark.parametrize("with_tls", [False, True])
def test_all_goes_by_grpc_too(with_tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a private CA, a header and compression."""
    credentials = None
    if with_tls:
        made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        made += ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
        subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
        key, certificate = ((tmp_path / name).read_bytes() for name in ("key.pem", "cert.pem"))
        credentials = grpc.ssl_server_credentials([(key, certificate)])
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(tmp_path / "cert.pem"))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Basic%20abc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    costs = Costs(CLOCK.now())
    with receiving_grpc(credentials) as receiver:
        with exporting(receiver, costs, variables={"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}) as export:
            export.job_ended(ended_job(costs))
            logging.getLogger("engine.queue.job_loop").warning("a line")

        assert {"job", "queue"} <= {span.name for span in receiver.spans}
        assert "worker.jobs" in receiver.metrics
        assert "a line" in {record.body.string_value for record in receiver.logs}


def test_a_collector_of_grpc_that_hangs_is_given_up() -> None:
    with receiving_grpc() as receiver:
        receiver.answers.clear()
        export = Export(
            receiver.url, {}, Costs(CLOCK.now()), Statistics(), variables={"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
        )
        begun = time.monotonic()
        export.shutdown(0.2)

        assert time.monotonic() - begun < 5.0


def test_nothing_is_sent_if_opentelemetry_is_switched_off(receiver: OTLPReceiver) -> None:
    costs = Costs(CLOCK.now())
    with exporting(receiver, costs, variables={"OTEL_SDK_DISABLED": "true"}) as export:
        times = ended_job(costs)
        export.job_started(times)
        export.job_ended(times)
        logging.getLogger("engine.queue.job_loop").warning("a line")

    assert not any(receiver.requests.values())
    assert not times.has_span


def test_log_records_say_which_job_they_are_about(receiver: OTLPReceiver) -> None:
    logger = logging.getLogger("engine.queue.job_loop")
    logger.setLevel(logging.INFO)
    with exporting(receiver) as export:
        times = JobTimes("job-1")
        export.job_started(times)
        token = CURRENT.set(times)
        logger.warning("within %s", "the job")
        CURRENT.reset(token)
        logger.error("outside", extra={"job_id": "job-2"})

    records = {record.body.string_value: record for record in receiver.logs}
    within, outside = records["within the job"], records["outside"]
    assert attributes(within)["worker.job.id"] == "job-1"
    assert (within.trace_id.hex(), within.span_id.hex()) == (f"{times.trace_id:032x}", f"{times.span_id:016x}")
    assert (within.severity_text, outside.severity_text) == ("WARN", "ERROR")
    assert attributes(outside)["worker.job.id"] == "job-2"
    assert outside.trace_id == b""


@pytest.mark.anyio
async def test_no_output_waits_for_a_collector_that_hangs(receiver: OTLPReceiver) -> None:
    """All jobs end, and so does the export, before the collector answers anything."""
    receiver.answers.clear()
    export = Export(receiver.url, {}, Costs(CLOCK.now()), Statistics(), variables={})
    harness = LoopHarness()
    vars(harness.loop).update(_on_started=export.job_started, _on_ended=export.job_ended)
    async with harness.running():
        for number in range(50):
            harness.submit(f"job-{number}", words=["a"] * 20)
        for number in range(50):
            assert await harness.queue.result(f"job-{number}") == {"output": ["a"] * 20}
    export.shutdown(0.1)

    assert receiver.asked.wait(30)
    assert receiver.spans == []


def test_jobs_that_are_too_many_are_dropped_and_counted(
    receiver: OTLPReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = COUNTERS.dropped
    with exporting(receiver) as export:
        monkeypatch.setattr("engine.telemetry.export.MAX_WAITING_JOBS", 0)
        for _ in range(2):
            export.job_ended(JobTimes("job-1"))

    assert COUNTERS.dropped - before == 2


def test_a_worker_without_a_collector_imports_nothing_of_it() -> None:
    code = "import sys, handler, engine.worker, engine.queue.job_loop, engine.jobs.pipeline; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not [name for name in done.stdout.split() if name.startswith(("opentelemetry", "prometheus_client"))]


def test_a_worker_serves_without_telemetry_if_opentelemetry_refuses_a_variable(
    receiver: OTLPReceiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "all")
    settings = Settings.model_construct(otel_exporter_otlp_endpoint=receiver.url, price_per_second=None)
    worker = Worker(cast("VLLMEngine", ScriptedEngine()), settings)

    assert worker._start_export() == {}
    assert "jobs are served without telemetry" in caplog.text
