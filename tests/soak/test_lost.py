"""How many jobs are lost: with this loop none; with the SDK's own, so many."""

from __future__ import annotations

import pytest

from tests.soak.conftest import Show
from tests.turmoil import job_input, run_jobs, signalled_around_arrivals, worker_settings

ARRIVALS = 100
JOBS = 2000


@pytest.mark.timeout(1800)
def test_two_hundred_sigterms_around_a_hundred_arrivals_lose_nothing(show: Show) -> None:
    settings = worker_settings(PAUSE_S="0.05") | {"lostAfter": 30}

    lost, rescued = signalled_around_arrivals(settings, ARRIVALS, 0.05)

    show(f"this loop, {2 * ARRIVALS} SIGTERMs within 50 ms of {ARRIVALS} arrivals: {lost} lost, {rescued} rescued")
    assert (lost, rescued) == (0, 0)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("loop", ["own", "stock"])
def test_sigterms_half_a_second_around_arrivals(loop: str, show: Show) -> None:
    """The SDK's loop looks for its signal between polls: those are held for 5 s, so that it ends soon."""
    settings = worker_settings(PAUSE_S="0.05", LOOP=loop)
    settings |= {"lostAfter": 15, "longPoll": 5, "maxRetries": 0}

    lost, _ = signalled_around_arrivals(settings, ARRIVALS, 0.5)

    show(f"{loop} loop, {2 * ARRIVALS} SIGTERMs within 0.5 s of {ARRIVALS} arrivals: {lost} lost")
    if loop == "own":
        assert lost == 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("loop", "retries"), [("own", 1000), ("own", 0), ("stock", 1000), ("stock", 0)])
def test_two_thousand_jobs_in_turmoil(loop: str, retries: int, show: Show) -> None:
    """A platform that gives lost jobs out again hides losses; one that does not loses those of killed workers."""
    jobs = [job_input(number) for number in range(JOBS)]

    ends, health, signals, seconds = run_jobs(jobs, worker_settings(LOOP=loop) | {"maxRetries": retries})

    show(
        f"{loop} loop, {JOBS} jobs, {retries} retries of the platform's: {JOBS - ends['right']} lost "
        f"in {seconds:.0f} s ({dict(ends)}, {health['retried']} given out again, {dict(signals)})"
    )
    if (loop, retries) == ("own", 1000):
        assert ends == {"right": JOBS}
        assert health["completed"] == JOBS
