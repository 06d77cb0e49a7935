"""No job is lost under faults and signals; for comparison, the SDK's own loop is counted too."""

from __future__ import annotations

import pytest

from tests.chaos import (
    Outcome,
    job_input,
    known_job,
    real_worker_settings,
    run_jobs,
    signalled_around_arrivals,
    stopped_while_idle,
    worker_settings,
)
from tests.soak.conftest import Show

ARRIVALS = 100
IDLE = 50
JOBS = 2000
SCHEMES = pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
NAMES = {False: "plain HTTP", True: "HTTPS"}


@pytest.mark.timeout(1800)
@SCHEMES
def test_an_idle_worker_takes_no_job_after_sigterm_and_ends_within_three_seconds(tls: bool, show: Show) -> None:
    settings = worker_settings(PAUSE_S="0.05") | {"lostAfter": 30}

    seconds = stopped_while_idle(settings, IDLE, tls=tls)

    p50, p95 = seconds[IDLE // 2], seconds[IDLE * 95 // 100]
    show(f"{NAMES[tls]}, {IDLE} SIGTERMs to idle workers: ended after {p50:.2f} s (p50), {p95:.2f} s (p95)")
    assert seconds[-1] < 3


@pytest.mark.timeout(1800)
@SCHEMES
def test_two_hundred_sigterms_around_a_hundred_arrivals_lose_no_job(tls: bool, show: Show) -> None:
    settings = worker_settings(PAUSE_S="0.05") | {"lostAfter": 30}

    outcome = signalled_around_arrivals(settings, ARRIVALS, 0.05, tls=tls)

    show(f"{NAMES[tls]}, {2 * ARRIVALS} SIGTERMs within 50 ms of {ARRIVALS} arrivals: {outcome}")
    assert outcome == Outcome(lost=0, failed=0, redelivered=0)


@pytest.mark.timeout(3600)
@SCHEMES
@pytest.mark.parametrize("loop", ["own", "stock"])
def test_sigterms_within_half_a_second_of_arrivals_lose_no_job_with_our_loop(loop: str, tls: bool, show: Show) -> None:
    """The SDK's loop checks for a signal between polls. They last 5 s here, so that it ends soon."""
    settings = worker_settings(PAUSE_S="0.05", LOOP=loop)
    settings |= {"lostAfter": 15, "longPoll": 5, "maxRetries": 0}

    outcome = signalled_around_arrivals(settings, ARRIVALS, 0.5, tls=tls)

    show(f"{loop} loop, {NAMES[tls]}, {2 * ARRIVALS} SIGTERMs within 0.5 s of {ARRIVALS} arrivals: {outcome}")
    if loop == "own":
        assert (outcome.lost, outcome.failed) == (0, 0)


@pytest.mark.timeout(1800)
@SCHEMES
@pytest.mark.parametrize(("loop", "retries"), [("own", 1000), ("own", 0), ("stock", 1000), ("stock", 0)])
def test_two_thousand_jobs_under_faults_and_signals_complete_with_our_loop(
    loop: str, retries: int, tls: bool, show: Show
) -> None:
    """A platform that redelivers lost jobs hides losses; one that does not loses the jobs of killed workers."""
    jobs = [job_input(number) for number in range(JOBS)]

    ends, health, signals, seconds = run_jobs(jobs, worker_settings(LOOP=loop) | {"maxRetries": retries}, tls=tls)

    show(
        f"{loop} loop, {NAMES[tls]}, {JOBS} jobs, {retries} retries by the platform: {JOBS - ends['right']} lost "
        f"in {seconds:.0f} s ({dict(ends)}, {health['retried']} redelivered, {dict(signals)})"
    )
    if (loop, retries) == ("own", 1000):
        assert ends == {"right": JOBS}
        assert health["completed"] == JOBS


@pytest.mark.timeout(3600)
def test_two_hundred_jobs_of_the_real_engine_complete_with_the_right_answer(tiny_model: str, show: Show) -> None:
    """Meanwhile workers get SIGTERM and SIGKILL; a new one takes half a minute to start."""
    jobs = [known_job(number) for number in range(200)]

    ends, health, signals, seconds = run_jobs(jobs, real_worker_settings(tiny_model), max_signals=3, timeout_s=3600)

    show(f"200 real jobs in {seconds:.0f} s: {dict(ends)}, {health['retried']} retried, {dict(signals)}")
    assert ends == {"right": 200}
    assert signals["SIGTERM"] + signals["SIGKILL"] >= 1
