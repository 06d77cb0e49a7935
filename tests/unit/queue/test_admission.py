"""Admission: as many jobs are taken as the engine can start at once and complete."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.queue.admission import KV_CACHE_HIGH_WATERMARK, Admission
from tests.unit.queue.fakes import FakeLoad


def slots(load: FakeLoad, running: int, limit: int = 256, cache_tokens: int = 10_000) -> int:
    return Admission(load, limit, cache_tokens).available_slots(running)


def test_an_idle_worker_takes_the_jobs_that_fit_with_half_of_their_output() -> None:
    assert slots(FakeLoad(), 0) == 18
    assert slots(FakeLoad(), 3) == 15


def test_the_concurrency_limit_is_kept_even_if_more_would_fit() -> None:
    assert [slots(FakeLoad(), running, limit=4) for running in (0, 3, 4, 5)] == [4, 1, 0, 0]


def test_a_request_that_is_too_long_for_the_cache_runs_when_no_other_does() -> None:
    assert [slots(FakeLoad(), running, cache_tokens=100) for running in (0, 1)] == [1, 0]


def test_nothing_is_taken_while_the_engine_has_requests_waiting() -> None:
    assert slots(FakeLoad(running=2, waiting=1, kv_cache_usage=0.1), 3) == 0
    assert slots(FakeLoad(running=2, waiting=0, kv_cache_usage=0.1), 3) > 0


def test_nothing_is_taken_while_the_cache_is_full() -> None:
    assert slots(FakeLoad(running=4, kv_cache_usage=0.95, avg_running_output_tokens=800), 4) == 0


def test_new_requests_reserve_the_cache_that_their_outputs_will_need() -> None:
    """Eighteen of 100 tokens, which will soon have 400 more each: the cache looks empty and is not."""
    assert slots(FakeLoad(running=18, kv_cache_usage=0.18), 18) == 0


def test_requests_that_are_half_done_leave_more_slots_than_new_ones() -> None:
    """Eight with 500 tokens each: those that end free cache for those that grow."""
    assert slots(FakeLoad(running=8, kv_cache_usage=0.4, avg_running_output_tokens=400), 8) == 10


def test_many_short_outputs_of_a_shared_prompt_fit() -> None:
    """Prompts that share cache blocks use few, however long each is."""
    load = FakeLoad(
        running=10, kv_cache_usage=0.1, avg_prompt_tokens=4000, avg_output_tokens=20, avg_running_output_tokens=10
    )

    assert slots(load, 10) == 80


def test_an_idle_worker_ignores_outdated_statistics() -> None:
    assert slots(FakeLoad(running=1, waiting=3, kv_cache_usage=1.0), 0) == 18


def test_an_engine_that_hardly_has_a_cache_is_limited_by_the_concurrency_limit_only() -> None:
    """As vLLM reports for an embedding model: one block."""
    embedder = Admission(FakeLoad(kv_cache_usage=1.0), 8, 16, 512)

    assert [embedder.available_slots(running) for running in (0, 3, 8, 9)] == [8, 5, 0, 0]
    assert Admission(FakeLoad(waiting=1), 8, 16, 512).available_slots(3) == 0


def test_a_cache_of_the_longest_request_limits_the_jobs() -> None:
    assert Admission(FakeLoad(kv_cache_usage=1.0), 8, 512, 512).available_slots(3) == 0


tokens = st.floats(0, 1e6)
loads = st.builds(
    FakeLoad, st.integers(0, 300), st.integers(0, 300), st.floats(0, 1), tokens, tokens, tokens
)  # fmt: skip


@given(loads, st.integers(0, 300), st.integers(1, 300), st.integers(0, 10**9))
def test_the_limit_is_never_exceeded_and_an_idle_worker_always_takes_a_job(
    load: FakeLoad, running: int, limit: int, cache_tokens: int
) -> None:
    found = slots(load, running, limit, cache_tokens)

    assert 0 <= found <= max(limit - running, 0)
    assert running > 0 or found > 0
    assert found == 0 or running == 0 or (load.kv_cache_usage < KV_CACHE_HIGH_WATERMARK and load.waiting == 0)


@given(loads, st.integers(1, 299))
def test_more_running_jobs_never_leave_more_slots(load: FakeLoad, running: int) -> None:
    assert slots(load, running + 1) <= slots(load, running)


@pytest.mark.parametrize("more", [0.0, 100.0])
def test_longer_answers_leave_less_slots(more: float) -> None:
    assert slots(FakeLoad(avg_output_tokens=800 + more), 0) <= slots(FakeLoad(), 0)
