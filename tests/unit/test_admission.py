"""How many jobs are taken: what the engine can start, and no more."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from engine.admission import FULL, Admission


@dataclass
class Load:
    """An engine's statistics, set by hand."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    steps: int = 0


def test_what_surely_fits_is_taken_at_once() -> None:
    assert Admission(Load(), limit=256, surely=8).room(0) == 8


def test_the_limit_holds_whatever_fits() -> None:
    admission = Admission(Load(), limit=4, surely=8)

    assert [admission.room(held) for held in (0, 3, 4, 5)] == [4, 1, 0, 0]


def test_a_model_too_long_for_the_cache_still_runs_one_job() -> None:
    assert Admission(Load(), limit=256, surely=0).room(0) == 1


def test_nothing_is_taken_while_the_engine_has_requests_waiting() -> None:
    load = Load(running=2, waiting=1, kv_cache_usage=0.1, steps=5)

    assert Admission(load, limit=256, surely=8).room(3) == 0
    load.waiting = 0
    assert Admission(load, limit=256, surely=8).room(3) == 5


def test_nothing_is_taken_while_the_cache_is_full() -> None:
    assert Admission(Load(running=4, kv_cache_usage=0.95, steps=5), limit=256, surely=8).room(4) == 0


def test_beyond_what_surely_fits_it_goes_by_what_a_request_uses() -> None:
    load = Load(running=8, kv_cache_usage=0.6, steps=5)

    assert Admission(load, limit=256, surely=8).room(8) == 4


def test_beyond_what_surely_fits_jobs_at_most_double() -> None:
    load = Load(running=8, kv_cache_usage=0.01, steps=5)

    assert Admission(load, limit=256, surely=8).room(8) == 8


def test_beyond_what_surely_fits_the_engine_is_heard_first() -> None:
    load = Load(running=8, kv_cache_usage=0.1, steps=5)
    admission = Admission(load, limit=256, surely=8)

    admission.taken()
    assert admission.room(8) == 0
    load.steps += 1
    assert admission.room(8) == 8


def test_old_statistics_do_not_keep_an_idle_worker_from_taking() -> None:
    assert Admission(Load(running=1, waiting=3, kv_cache_usage=1.0), limit=256, surely=8).room(0) == 8


loads = st.builds(Load, st.integers(0, 300), st.integers(0, 300), st.floats(0, 1), st.integers(0, 3))


@given(loads, st.integers(1, 300), st.integers(0, 300), st.integers(0, 300))
def test_the_limit_is_never_passed_and_an_idle_worker_never_starves(
    load: Load, limit: int, surely: int, held: int
) -> None:
    room = Admission(load, limit, surely).room(held)

    assert 0 <= room <= max(limit - held, 0)
    assert held > 0 or room > 0
    assert room == 0 or held < max(surely, 1) or (load.kv_cache_usage < FULL and load.waiting == 0)
