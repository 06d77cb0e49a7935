"""What a job cost, and the sums over jobs."""

from __future__ import annotations

import json
import logging

import pytest

from engine.telemetry.costs import MAX_MODELS, Costs
from engine.telemetry.job_times import OTHER, JobTimes, RequestStats
from tests.unit.telemetry.test_worker_seconds import Clock


def job(costs: Costs, clock: Clock, model: str | None = "tiny", duration_s: float = 2.0) -> JobTimes:
    """Run a job."""
    times = JobTimes("job-1", submitted_at_s=1000.0, taken_at=clock(), taken_at_s=1003.5, model=model)
    costs.begin(times)
    clock.now_s += duration_s
    times.ended_at = clock()
    times.requests.append(RequestStats(10, 5, 0.1, 0.2, 0.3))
    costs.end(times)
    return times


def test_a_jobs_document_says_where_its_time_went_and_what_it_cost() -> None:
    clock = Clock()
    costs = Costs(clock(), 0.5, clock)
    clock.now_s += 10.0
    costs.seconds.ready()

    assert costs.document(job(costs, clock)) == {
        "queue_s": 3.5,
        "engine_queue_s": 0.1,
        "prefill_s": 0.2,
        "decode_s": 0.3,
        "delivery_s": 0.0,
        "duration_s": 2.0,
        "worker_s": 2.0,
        "start_s": 10.0,
        "cost": 6.0,
    }


def test_what_is_not_known_is_null() -> None:
    costs = Costs(0.0)
    times = JobTimes("job-1")
    costs.begin(times)

    document = costs.document(times)
    assert {name for name, value in document.items() if value is None} == {
        "queue_s", "engine_queue_s", "prefill_s", "decode_s",
    }  # fmt: skip
    assert "cost" not in document


def test_the_summary_adds_up_to_the_workers_seconds(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    costs = Costs(clock(), 0.01, clock)
    clock.now_s += 10.0
    costs.seconds.ready()
    clock.now_s += 30.0
    job(costs, clock)
    job(costs, clock, "other-name", 4.0)
    clock.now_s += 5.0
    with caplog.at_level(logging.INFO):
        costs.log_summary()

    summary = json.loads(caplog.messages[-1].removeprefix("Worker seconds "))
    assert (summary["worker_s"], summary["start_s"], summary["idle_s"], summary["jobs_s"]) == (51.0, 10.0, 35.0, 6.0)
    assert summary["cost"] == 0.51
    assert summary["models"] == {
        "tiny": {"jobs": 1, "worker_s": 2.0, "start_s": 0.0, "tokens_in": 10, "tokens_out": 5, "cost": 0.02},
        "other-name": {"jobs": 1, "worker_s": 4.0, "start_s": 0.0, "tokens_in": 10, "tokens_out": 5, "cost": 0.04},
    }


def test_a_name_that_the_engine_has_not_answered_to_is_not_kept() -> None:
    clock = Clock()
    costs = Costs(clock(), now=clock)
    times = JobTimes("job-1", model="a client's words")
    costs.begin(times)
    costs.end(times)

    assert list(costs.by_model) == [OTHER] == [times.served_model]


def test_the_number_of_names_is_limited() -> None:
    clock = Clock()
    costs = Costs(clock(), now=clock)
    for number in range(MAX_MODELS + 5):
        job(costs, clock, f"adapter-{number}")

    assert len(costs.by_model) == MAX_MODELS + 1
    assert costs.by_model[OTHER].jobs == 5
