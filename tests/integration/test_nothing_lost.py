"""Under faults and signals, every job ends once, with the right answer: real SDK, real HTTP, real processes."""

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

# RunPod uses HTTPS; the emulator uses plain HTTP by default.
SCHEMES = pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])


@pytest.mark.parametrize(("tls", "count"), [(False, 1000), (True, 1000)], ids=["http", "https"])
def test_each_job_under_faults_and_signals_completes_once_with_the_right_answer(
    tls: bool, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make soak` runs two thousand."""
    jobs = [job_input(number) for number in range(count)]

    ends, health, signals, seconds = run_jobs(jobs, worker_settings(), tls=tls)

    with capsys.disabled():
        print(f"\n{count} jobs in {seconds:.0f} s: {dict(ends)}, {health['retried']} retried, {dict(signals)}")  # noqa: T201
    assert ends == {"right": count}
    assert health["completed"] == count
    assert signals["SIGTERM"] + signals["SIGKILL"] >= 2


@pytest.mark.timeout(900)
def test_each_job_of_the_real_engine_completes_with_the_right_answer(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make soak` runs two hundred."""
    jobs = [known_job(number) for number in range(60)]
    # The timeout includes the starts of all workers.
    ends, health, signals, seconds = run_jobs(jobs, real_worker_settings(tiny_model), max_signals=1, timeout_s=1800)

    with capsys.disabled():
        print(f"\n60 real jobs in {seconds:.0f} s: {dict(ends)}, {health['retried']} retried, {dict(signals)}")  # noqa: T201
    assert ends == {"right": 60}
    assert signals["SIGTERM"] + signals["SIGKILL"] == 1


@SCHEMES
def test_sigterm_around_the_arrival_of_a_job_loses_none(tls: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """`make soak` sends two hundred, and also to workers with the SDK's own loop."""
    # With a short limit, the platform would take a worker on a busy machine for lost.
    settings = worker_settings(PAUSE_S="0.05") | {"lostAfter": 30}

    outcome = signalled_around_arrivals(settings, 12, 0.05, tls=tls)

    with capsys.disabled():
        print(f"\n24 SIGTERMs around 12 arrivals: {outcome}")  # noqa: T201
    assert outcome == Outcome(lost=0, failed=0, redelivered=0)


@SCHEMES
def test_an_idle_worker_takes_no_job_after_sigterm_and_ends_within_three_seconds(tls: bool) -> None:
    settings = worker_settings(PAUSE_S="0.05") | {"lostAfter": 30}

    seconds = stopped_while_idle(settings, 3, tls=tls)

    assert max(seconds) < 3
