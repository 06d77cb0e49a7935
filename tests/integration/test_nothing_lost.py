"""Whatever fails on the way, every job ends once, with the right answer: real SDK, real HTTP, real signals."""

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

# RunPod speaks HTTPS; plain HTTP is what the emulator speaks unless it is told otherwise.
SCHEMES = pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])


@pytest.mark.parametrize(("tls", "count"), [(False, 1000), (True, 1000)], ids=["http", "https"])
def test_jobs_under_faults_and_kills_end_once_each_with_the_right_answer(
    tls: bool, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make soak` has two thousand."""
    jobs = [job_input(number) for number in range(count)]

    ends, health, signals, seconds = run_jobs(jobs, worker_settings(), tls=tls)

    with capsys.disabled():
        print(f"\n{count} jobs in {seconds:.0f} s: {dict(ends)}, {health['retried']} retried, {dict(signals)}")  # noqa: T201
    assert ends == {"right": count}
    assert health["completed"] == count
    assert signals["SIGTERM"] + signals["SIGKILL"] >= 2


@pytest.mark.timeout(900)
def test_jobs_of_the_real_engine_end_with_the_right_answer(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`make soak` has two hundred."""
    jobs = [known_job(number) for number in range(60)]
    # A job's time runs from its submission, over the starts of all the workers.
    ends, health, signals, seconds = run_jobs(jobs, real_worker_settings(tiny_model), most_signals=1, timeout_s=1800)

    with capsys.disabled():
        print(f"\n60 real jobs in {seconds:.0f} s: {dict(ends)}, {health['retried']} retried, {dict(signals)}")  # noqa: T201
    assert ends == {"right": 60}
    assert signals["SIGTERM"] + signals["SIGKILL"] == 1


@SCHEMES
def test_sigterm_around_a_jobs_arrival_loses_none(tls: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """`make soak` has two hundred, and the SDK's own loop beside them."""
    # A platform that is quick to rescue jobs would take a busy machine for a lost one.
    settings = worker_settings(PAUSE_S="0.05") | {"lostAfter": 30}

    outcome = signalled_around_arrivals(settings, 12, 0.05, tls=tls)

    with capsys.disabled():
        print(f"\n24 SIGTERMs around 12 arrivals: {outcome}")  # noqa: T201
    assert outcome == Outcome(lost=0, failed=0, rescued=0)


@SCHEMES
def test_an_idle_worker_that_is_told_to_stop_is_given_no_job_and_ends_at_once(tls: bool) -> None:
    settings = worker_settings(PAUSE_S="0.05") | {"lostAfter": 30}

    seconds = stopped_while_idle(settings, 3, tls=tls)

    assert max(seconds) < 3
