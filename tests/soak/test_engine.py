"""The real engine under load: how soon what is cancelled is gone, and what admission makes of a small KV cache."""

from __future__ import annotations

import re
import statistics
import sys
import time
from typing import Any

import pytest

from tests.integration.emulator.conftest import LLM_START_S, REPOSITORY, Site, eventually, site_with
from tests.integration.test_worker import metric
from tests.job_queue import JobQueue
from tests.processes import VLLM_ENVIRONMENT
from tests.soak.conftest import Show

RUNNING = 24
LONG_JOBS = 100
ANSWER_TOKENS = 400


def percentiles(values: list[float]) -> tuple[float, float]:
    """The 50th and the 95th."""
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("worker")
def test_what_is_cancelled_under_load_is_soon_gone_from_the_engine(job_queue: JobQueue, show: Show) -> None:
    """The time is from the client's cancellation to the answer of a job that asks vLLM for its running requests."""

    def running() -> float:
        return metric(job_queue, "num_requests_running")

    asked = {"prompt": "January,", "sampling_params": {"max_tokens": 1900, "ignore_eos": True}, "stream": True}
    jobs = [job_queue.submit(asked) for _ in range(RUNNING)]
    for job in jobs:
        job.first_output()
    eventually(lambda: running() == RUNNING)
    ran_to_the_end = metric(job_queue, "request_success_total", 'finished_reason="length"')
    took_ms = []
    for left, job in zip(reversed(range(RUNNING)), jobs, strict=True):
        begun = time.monotonic()
        job_queue.cancel(job)
        eventually(lambda left=left: running() <= left, interval_s=0)  # type: ignore[misc]
        took_ms.append(1000 * (time.monotonic() - begun))

    p50, p95 = percentiles(took_ms)
    show(f"{RUNNING} running, cancelled one by one: gone from the engine after p50 {p50:.0f} ms, p95 {p95:.0f} ms")
    assert metric(job_queue, "request_success_total", 'finished_reason="length"') == ran_to_the_end
    assert p50 < 200


def preemptions(site: Site, workers: int) -> int:
    """How often these workers' engines have made a request give way, in all; a job that asks meets any of them."""
    told: dict[str, int] = {}

    def ask() -> bool:
        for job_id in [site.submit({"openai_route": "/metrics"}) for _ in range(8)]:
            end = site.ended(job_id)
            (count,) = re.findall(r"^vllm:num_preemptions_total{.*} (\S+)$", end["output"][0], re.MULTILINE)
            told[end["workerId"]] = int(float(count))
        return len(told) == workers

    eventually(ask, 60)
    return sum(told.values())


def long_jobs(model: str, worker: list[str], concurrency: str) -> tuple[int, list[float], float, set[str]]:
    """A hundred long jobs for two workers whose cache holds 4,096 tokens.

    Returns:
        Preemptions; the seconds of each job in its worker; the seconds for all; the workers that had any.
    """
    cache = {"BLOCK_SIZE": "128", "NUM_GPU_BLOCKS_OVERRIDE": "33"}  # One block is vLLM's own.
    settings: dict[str, Any] = {
        "command": [sys.executable, *worker],
        "cwd": str(REPOSITORY),
        "env": {**VLLM_ENVIRONMENT, **cache, "MODEL_NAME": model, "ALLOWED_ROUTES": "/metrics"},
        "workersMin": 2,
        "workersMax": 2,
        "rateLimits": False,
    }
    settings["env"]["MAX_CONCURRENCY"] = concurrency
    asked = {"prompt": "January,", "sampling_params": {"max_tokens": ANSWER_TOKENS, "ignore_eos": True}, "stream": True}
    with site_with(**settings) as site:
        site.idle_workers(2, LLM_START_S)
        begun = time.monotonic()
        ends = [site.ended(job_id, 600) for job_id in [site.submit(asked) for _ in range(LONG_JOBS)]]
        all_s = time.monotonic() - begun
        assert [end["status"] for end in ends] == ["COMPLETED"] * LONG_JOBS
        assert {end["output"][-1]["usage"]["completion_tokens"] for end in ends} == {ANSWER_TOKENS}
        taken_by = {end["workerId"] for end in ends}
        return preemptions(site, 2), [end["executionTime"] / 1000 for end in ends], all_s, taken_by


@pytest.mark.timeout(1800)
def test_admission_by_the_cache_does_better_than_a_fixed_limit(tiny_model: str, show: Show) -> None:
    made_way, p95_s = [], []
    for told, worker, concurrency in (
        ("by the cache", ["handler.py"], "auto"),
        ("a fixed limit of 30", ["-m", "tests.soak.fixed_worker"], "30"),
    ):
        count, in_worker_s, all_s, workers = long_jobs(tiny_model, worker, concurrency)
        made_way.append(count)
        p95_s.append(percentiles(in_worker_s)[1])
        show(
            f"{LONG_JOBS} jobs of {ANSWER_TOKENS} tokens, two caches of 4096, {told}: "
            f"{count} preemptions, p95 in the worker {p95_s[-1]:.1f} s, all after {all_s:.1f} s"
        )
        assert len(workers) == 2

    assert made_way[0] < made_way[1]
    assert p95_s[0] < p95_s[1]
