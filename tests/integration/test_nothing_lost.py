"""Whatever fails on the way, every job ends once, with the right answer: real SDK, real HTTP, real signals."""

from __future__ import annotations

import sys

import pytest

from tests.processes import VLLM_ENVIRONMENT
from tests.turmoil import job_input, known_job, run_jobs, signalled_around_arrivals, worker_settings


def test_two_thousand_jobs_end_once_each_with_the_right_answer(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [job_input(number) for number in range(2000)]

    ends, health, signals, seconds = run_jobs(jobs, worker_settings())

    with capsys.disabled():
        print(f"\n2000 jobs in {seconds:.0f} s: {dict(ends)}, {health['retried']} retried, {dict(signals)}")  # noqa: T201
    assert ends == {"right": 2000}
    assert health["completed"] == 2000
    assert signals["SIGTERM"] + signals["SIGKILL"] >= 4


@pytest.mark.timeout(1800)
def test_two_hundred_jobs_of_the_real_engine_end_with_the_right_answer(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few at once, so that there is something to lose when a worker goes; its next one takes half a minute to start."""
    own = {"command": [sys.executable, "handler.py"], "lostAfter": 10}
    variables = {"MODEL_NAME": tiny_model, "SERVED_MODEL_NAME": "tiny", "MAX_CONCURRENCY": "2"}
    settings = worker_settings() | own | {"env": {**VLLM_ENVIRONMENT, **variables}}

    jobs = [known_job(number) for number in range(200)]
    # A job's time runs from its submission, over the starts of all the workers.
    ends, health, signals, seconds = run_jobs(jobs, settings, most_signals=3, timeout_s=3600)

    with capsys.disabled():
        print(f"\n200 real jobs in {seconds:.0f} s: {dict(ends)}, {health['retried']} retried, {dict(signals)}")  # noqa: T201
    assert ends == {"right": 200}
    assert signals["SIGTERM"] + signals["SIGKILL"] >= 1


def test_sigterm_around_a_jobs_arrival_loses_none(capsys: pytest.CaptureFixture[str]) -> None:
    """`make soak` has two hundred, and the SDK's own loop beside them."""
    # A platform that is quick to rescue jobs would take a busy machine for a lost one.
    settings = worker_settings(PAUSE_S="0.05") | {"lostAfter": 30}

    lost, rescued = signalled_around_arrivals(settings, 24, 0.05)

    with capsys.disabled():
        print(f"\n48 SIGTERMs around 24 arrivals: {lost} jobs lost, {rescued} rescued by the platform")  # noqa: T201
    assert (lost, rescued) == (0, 0)
