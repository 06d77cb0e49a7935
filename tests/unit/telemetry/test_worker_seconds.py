"""The worker's seconds: whatever runs when, the shares and what is nobody's add up to the worker's age."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.telemetry.worker_seconds import START_GRACE_S, Share, WorkerSeconds


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def started(clock: Clock, start_s: float = 10.0) -> WorkerSeconds:
    """Return the seconds of a worker that has just become ready."""
    seconds = WorkerSeconds(clock(), clock)
    clock.now_s += start_s
    seconds.ready()
    return seconds


def test_jobs_at_the_same_time_share_each_second_equally() -> None:
    clock = Clock()
    seconds = started(clock)
    clock.now_s += 5.0
    long, short = Share(), Share()
    seconds.begin(long)
    clock.now_s += 2.0
    seconds.begin(short)
    clock.now_s += 4.0
    seconds.end(short)
    clock.now_s += 1.0
    seconds.end(long)
    clock.now_s += 3.0

    assert (long.worker_s, short.worker_s) == (5.0, 2.0)
    totals = seconds.totals()
    assert (totals.worker_s, totals.start_s, totals.idle_s, totals.jobs_s) == (25.0, 10.0, 8.0, 7.0)


def test_the_start_is_shared_by_the_jobs_that_waited_for_it() -> None:
    clock = Clock()
    seconds = started(clock)
    waiting, also_waiting, later = Share(), Share(), Share()
    seconds.begin(waiting)
    seconds.begin(also_waiting)
    clock.now_s += START_GRACE_S + 1.0
    seconds.begin(later)
    seconds.end(later)
    seconds.update(also_waiting)
    assert also_waiting.start_s == 5.0
    seconds.end(waiting)
    seconds.end(also_waiting)

    assert (waiting.start_s, also_waiting.start_s, later.start_s) == (5.0, 5.0, 0.0)
    assert seconds.totals().start_s == 0.0


def test_a_start_that_no_job_waited_for_is_nobodys() -> None:
    clock = Clock()
    seconds = started(clock)
    clock.now_s += START_GRACE_S + 0.1
    share = Share()
    seconds.begin(share)
    seconds.end(share)

    assert share.start_s == 0.0
    assert seconds.totals().start_s == 10.0


def test_a_worker_that_is_not_ready_has_only_a_start() -> None:
    clock = Clock()
    seconds = WorkerSeconds(clock(), clock)
    clock.now_s += 4.0

    assert (seconds.totals().worker_s, seconds.totals().start_s) == (4.0, 4.0)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 5)), max_size=60), st.floats(0, 500))
def test_all_seconds_add_up_at_any_time(steps: list[tuple[float, int]], start_s: float) -> None:
    """Step n begins a job, or ends the job of this number, if it runs."""
    clock = Clock()
    seconds = started(clock, start_s)
    running: dict[int, Share] = {}
    ended: list[Share] = []
    for wait_s, number in steps:
        clock.now_s += wait_s
        if number in running:
            ended.append(running.pop(number))
            seconds.end(ended[-1])
        else:
            running[number] = Share()
            seconds.begin(running[number])
        totals = seconds.totals()
        assert totals.start_s + totals.idle_s + totals.jobs_s == pytest.approx(totals.worker_s)
        assert totals.worker_s == pytest.approx(clock() - 100.0)
    for share in running.values():
        seconds.update(share)
    shares_s = sum(share.worker_s + share.start_s for share in (*ended, *running.values()))
    assert shares_s == pytest.approx(seconds.totals().jobs_s)
