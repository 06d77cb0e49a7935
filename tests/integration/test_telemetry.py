"""A worker on the real engine whose telemetry goes to a collector, by OpenTelemetry's exporters and vLLM's own."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest

from bench.collector import OTLPReceiver, attributes, receiving
from tests.emulator_queue import QueuedJob, emulator_queue
from tests.processes import VLLM_ENVIRONMENT, running

START_S = 240.0
JOBS = 6
PRICE_PER_SECOND = 0.001
START_OF_PROCESS_S = 0.5
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}


def chat(**fields: Any) -> dict[str, Any]:
    return {"openai_route": "/v1/chat/completions", "openai_input": {**CHAT, **fields}}


@dataclass
class Run:
    """What a worker left behind: it was started for a job, ran several at once, was idle, and was asked to stop."""

    first: QueuedJob
    streamed: QueuedJob
    log: list[dict[str, Any]]
    started_at: float
    life_s: float
    exit_status: int
    receiver: OTLPReceiver

    def ended_jobs(self) -> dict[str, dict[str, Any]]:
        """Return the log lines of jobs that have ended, by id."""
        return {line["job"]: line for line in self.log if line.get("status") == "completed"}

    def summary(self) -> tuple[dict[str, Any], float]:
        """Return the worker's seconds as it has logged them last, and the seconds from its start to that line."""
        line = next(line for line in self.log if "Worker seconds" in line.get("message", ""))
        document = json.loads(line["message"].removeprefix("Worker seconds "))
        assert isinstance(document, dict)
        return document, datetime.fromisoformat(line["time"]).timestamp() - self.started_at


@pytest.fixture(scope="module")
def run(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with receiving() as receiver, emulator_queue() as queue:
        environment = {
            **VLLM_ENVIRONMENT,
            **queue.environment,
            "MODEL_NAME": tiny_model,
            "SERVED_MODEL_NAME": "tiny",
            "LOG_FORMAT": "json",
            "PRICE_PER_SECOND": str(PRICE_PER_SECOND),
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            # vLLM's own spans, which know this variable only.
            "OTLP_TRACES_ENDPOINT": f"{receiver.url}/v1/traces",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        }
        first = queue.submit(chat(include_costs=True) | {"traceparent": TRACEPARENT})
        log_path = tmp_path_factory.mktemp("worker") / "log"
        started_at = time.time()
        with running(["handler.py"], environment, log_path) as process:
            process.wait_for(queue.has_worker, START_S)
            first.wait()
            jobs = [queue.submit(chat(stream=True, include_costs=True)) for _ in range(JOBS)]
            for job in jobs:
                job.wait()
            time.sleep(2.0)  # Idle.
            process.popen.send_signal(signal.SIGTERM)
            status = process.popen.wait(60)
            life_s = time.time() - started_at
            log = [json.loads(line) for line in process.log.splitlines()]
        yield Run(first, jobs[0], log, started_at, life_s, status, receiver)


@pytest.mark.timeout(400)
def test_every_line_of_the_log_is_an_object(run: Run) -> None:
    assert run.exit_status == 0
    assert all({"time", "level"} <= line.keys() for line in run.log)
    assert any("EngineCore" in line.get("process", "") for line in run.log)


def test_the_seconds_of_all_jobs_and_of_none_are_the_workers(run: Run) -> None:
    jobs, (summary, life_s) = run.ended_jobs(), run.summary()

    shares_s = sum(line["worker_s"] + line["start_s"] for line in jobs.values())
    assert len(jobs) == JOBS + 1
    assert shares_s + summary["start_s"] + summary["idle_s"] == pytest.approx(summary["worker_s"], rel=0.01)
    assert shares_s == pytest.approx(summary["jobs_s"], rel=0.01)
    assert summary["worker_s"] == pytest.approx(life_s, rel=0.01, abs=START_OF_PROCESS_S)
    cost = sum(line["cost"] for line in jobs.values())
    assert cost + (summary["start_s"] + summary["idle_s"]) * PRICE_PER_SECOND == pytest.approx(
        summary["cost"], rel=0.01
    )
    assert jobs[run.first.id]["start_s"] > 1.0  # It waited for the worker.
    assert summary["models"]["tiny"]["jobs"] == JOBS + 1


def test_the_answers_say_what_their_jobs_cost(run: Run) -> None:
    costs = run.first.status()["output"][0]["costs"]
    assert costs["prefill_s"] > 0
    assert costs["decode_s"] > 0
    assert costs["cost"] > PRICE_PER_SECOND
    event = "".join(run.streamed.outputs).split("\n\n")[-3]
    assert json.loads(event.removeprefix("data: "))["costs"]["decode_s"] > 0


def test_the_clients_trace_has_the_job_and_vllms_request(run: Run) -> None:
    spans = [span for span in run.receiver.spans if span.trace_id.hex() == TRACEPARENT[3:35]]

    job = next(span for span in spans if span.name == "job")
    assert attributes(job)["worker.job.id"] == run.first.id
    assert {"engine queue", "prefill", "decode", "deliver", "llm_request"} <= {span.name for span in spans}
    assert {span.parent_span_id for span in spans if span is not job} == {job.span_id}
    inner = [span for span in spans if span.name in ("prefill", "decode")]
    assert all(
        job.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= job.end_time_unix_nano
        for span in inner
    )
    start = next(span for span in run.receiver.spans if span.name == "cold start")
    assert [link.trace_id for link in job.links] == [start.trace_id]
    phases = {span.name for span in run.receiver.spans if span.parent_span_id == start.span_id}
    assert {"imports", "engine", "app"} <= phases


def test_metrics_are_the_workers_and_vllms(run: Run) -> None:
    metrics = run.receiver.metrics

    (tokens,) = metrics["vllm:generation_tokens"].sum.data_points
    lines = run.ended_jobs().values()
    assert tokens.as_double == sum(line["tokens_out"] for line in lines)
    assert metrics["vllm:time_to_first_token_seconds"].histogram.data_points[0].count == JOBS + 1
    durations = metrics["gen_ai.server.request.duration"].exponential_histogram.data_points
    assert sum(point.count for point in durations) == JOBS + 1
    seconds = {attributes(one)["kind"]: one.as_double for one in metrics["worker.seconds"].sum.data_points}
    # They are sent between the last line of the log and the end of the process.
    _, logged_s = run.summary()
    assert logged_s - START_OF_PROCESS_S <= sum(seconds.values()) <= run.life_s


def test_logs_are_of_the_worker_and_of_vllm(run: Run) -> None:
    records = run.receiver.logs

    assert any(attributes(record).get("worker.job.id") == run.first.id for record in records)
    assert any(record.body.string_value.startswith("Worker seconds") for record in records)
