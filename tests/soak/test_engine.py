"""The real engine under load: how fast cancelled jobs are aborted, and how admission uses a small KV cache."""

from __future__ import annotations

import re
import statistics
import sys
import time
from typing import Any

import pytest

from tests.emulator_queue import EmulatorQueue
from tests.integration.emulator.conftest import LLM_START_S, REPOSITORY, Site, eventually, site_with
from tests.integration.test_worker import metric
from tests.processes import VLLM_ENVIRONMENT
from tests.soak.conftest import Show

RUNNING = 24
LONG_JOBS = 100
ANSWER_TOKENS = 400


def percentiles(values: list[float]) -> tuple[float, float]:
    """Return the 50th and the 95th percentile."""
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("worker")
def test_cancelled_jobs_under_load_leave_the_engine_within_milliseconds(job_queue: EmulatorQueue, show: Show) -> None:
    """Measured from the cancellation to the answer of a job that reads vLLM's number of running requests."""

    def running() -> float:
        return metric(job_queue, "num_requests_running")

    request = {"prompt": "January,", "sampling_params": {"max_tokens": 1900, "ignore_eos": True}, "stream": True}
    jobs = [job_queue.submit(request) for _ in range(RUNNING)]
    for job in jobs:
        job.first_output()
    eventually(lambda: running() == RUNNING)
    completed = metric(job_queue, "request_success_total", 'finished_reason="length"')
    durations_ms = []
    for remaining, job in zip(reversed(range(RUNNING)), jobs, strict=True):
        begun = time.monotonic()
        job_queue.cancel(job)
        eventually(lambda remaining=remaining: running() <= remaining, interval_s=0)  # type: ignore[misc]
        durations_ms.append(1000 * (time.monotonic() - begun))

    p50, p95 = percentiles(durations_ms)
    show(f"{RUNNING} running, cancelled one by one: aborted after p50 {p50:.0f} ms, p95 {p95:.0f} ms")
    assert metric(job_queue, "request_success_total", 'finished_reason="length"') == completed
    assert p50 < 200


def preemptions(site: Site, workers: int) -> int:
    """Return the number of preemptions in all of these workers' engines; a job that reads it may run on any of them."""
    counts: dict[str, int] = {}

    def read() -> bool:
        for job_id in [site.submit({"openai_route": "/metrics"}) for _ in range(8)]:
            end = site.ended(job_id)
            (count,) = re.findall(r"^vllm:num_preemptions_total{.*} (\S+)$", end["output"][0], re.MULTILINE)
            counts[end["workerId"]] = int(float(count))
        return len(counts) == workers

    eventually(read, 60)
    return sum(counts.values())


def long_jobs(model: str, worker: list[str], concurrency: str) -> tuple[int, list[float], float, set[str]]:
    """Run a hundred long jobs on two workers whose KV caches have 4,096 tokens each.

    Returns:
        Number of preemptions; seconds of each job in its worker; seconds for all jobs; ids of the workers that ran any.
    """
    cache = {"BLOCK_SIZE": "128", "NUM_GPU_BLOCKS_OVERRIDE": "33"}  # vLLM keeps one block for itself.
    settings: dict[str, Any] = {
        "command": [sys.executable, *worker],
        "cwd": str(REPOSITORY),
        "env": {**VLLM_ENVIRONMENT, **cache, "MODEL_NAME": model, "ALLOWED_ROUTES": "/metrics"},
        "workersMin": 2,
        "workersMax": 2,
        "rateLimits": False,
    }
    settings["env"]["MAX_CONCURRENCY"] = concurrency
    request = {
        "prompt": "January,",
        "sampling_params": {"max_tokens": ANSWER_TOKENS, "ignore_eos": True},
        "stream": True,
    }
    with site_with(**settings) as site:
        site.idle_workers(2, LLM_START_S)
        begun = time.monotonic()
        ends = [site.ended(job_id, 600) for job_id in [site.submit(request) for _ in range(LONG_JOBS)]]
        total_s = time.monotonic() - begun
        assert [end["status"] for end in ends] == ["COMPLETED"] * LONG_JOBS
        assert {end["output"][-1]["usage"]["completion_tokens"] for end in ends} == {ANSWER_TOKENS}
        workers = {end["workerId"] for end in ends}
        return preemptions(site, 2), [end["executionTime"] / 1000 for end in ends], total_s, workers


@pytest.mark.timeout(1800)
def test_admission_by_kv_cache_has_fewer_preemptions_and_a_lower_p95_than_a_fixed_limit(
    tiny_model: str, show: Show
) -> None:
    preemption_counts, p95_s = [], []
    for name, worker, concurrency in (
        ("by KV cache", ["handler.py"], "auto"),
        ("a fixed limit of 30", ["-m", "tests.soak.fixed_worker"], "30"),
    ):
        count, in_worker_s, total_s, workers = long_jobs(tiny_model, worker, concurrency)
        preemption_counts.append(count)
        p95_s.append(percentiles(in_worker_s)[1])
        show(
            f"{LONG_JOBS} jobs of {ANSWER_TOKENS} tokens, two caches of 4096, {name}: "
            f"{count} preemptions, p95 in the worker {p95_s[-1]:.1f} s, all after {total_s:.1f} s"
        )
        assert len(workers) == 2

    assert preemption_counts[0] < preemption_counts[1]
    assert p95_s[0] < p95_s[1]
