"""How many jobs are taken: what the engine can start and bring to its end, and no more."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.queue.admission import KV_CACHE_HIGH_WATERMARK, Admission


@dataclass
class Load:
    """An engine's statistics, set by hand."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    avg_prompt_tokens: float = 100.0
    avg_output_tokens: float = 800.0
    avg_running_output_tokens: float = 0.0


def room(load: Load, held: int, limit: int = 256, cache_tokens: int = 10_000) -> int:
    return Admission(load, limit, cache_tokens).available_slots(held)


def test_an_idle_worker_takes_what_fits_with_half_its_answer() -> None:
    assert room(Load(), 0) == 18
    assert room(Load(), 3) == 15


def test_the_limit_holds_whatever_fits() -> None:
    assert [room(Load(), held, limit=4) for held in (0, 3, 4, 5)] == [4, 1, 0, 0]


def test_a_request_too_long_for_the_cache_still_runs_alone() -> None:
    assert [room(Load(), held, cache_tokens=100) for held in (0, 1)] == [1, 0]


def test_nothing_is_taken_while_the_engine_has_requests_waiting() -> None:
    assert room(Load(running=2, waiting=1, kv_cache_usage=0.1), 3) == 0
    assert room(Load(running=2, waiting=0, kv_cache_usage=0.1), 3) > 0


def test_nothing_is_taken_while_the_cache_is_full() -> None:
    assert room(Load(running=4, kv_cache_usage=0.95, avg_running_output_tokens=800), 4) == 0


def test_requests_that_have_just_begun_keep_the_room_that_they_will_want() -> None:
    """Eighteen of 100 tokens, which will soon have 400 more each: the cache looks empty, and is spoken for."""
    assert room(Load(running=18, kv_cache_usage=0.18), 18) == 0


def test_requests_of_mixed_ages_make_room_as_they_end() -> None:
    """Eight that are half-way, with 500 tokens each: what ends makes room for what grows."""
    assert room(Load(running=8, kv_cache_usage=0.4, avg_running_output_tokens=400), 8) == 10


def test_short_answers_behind_a_shared_prompt_are_many() -> None:
    """Prompts that share their cache take up little, however long each is."""
    load = Load(
        running=10, kv_cache_usage=0.1, avg_prompt_tokens=4000, avg_output_tokens=20, avg_running_output_tokens=10
    )

    assert room(load, 10) == 80


def test_old_statistics_do_not_keep_an_idle_worker_from_taking() -> None:
    assert room(Load(running=1, waiting=3, kv_cache_usage=1.0), 0) == 18


def test_an_engine_without_a_cache_to_speak_of_runs_as_many_as_the_limit_says() -> None:
    """As vLLM reports a model that only embeds: one block."""
    embedder = Admission(Load(kv_cache_usage=1.0), 8, 16, 512)

    assert [embedder.available_slots(held) for held in (0, 3, 8, 9)] == [8, 5, 0, 0]
    assert Admission(Load(waiting=1), 8, 16, 512).available_slots(3) == 0


def test_a_cache_of_the_longest_request_counts() -> None:
    assert Admission(Load(kv_cache_usage=1.0), 8, 512, 512).available_slots(3) == 0


tokens = st.floats(0, 1e6)
loads = st.builds(
    Load, st.integers(0, 300), st.integers(0, 300), st.floats(0, 1), tokens, tokens, tokens
)  # fmt: skip


@given(loads, st.integers(0, 300), st.integers(1, 300), st.integers(0, 10**9))
def test_the_limit_is_never_passed_and_an_idle_worker_never_starves(
    load: Load, held: int, limit: int, cache_tokens: int
) -> None:
    found = room(load, held, limit, cache_tokens)

    assert 0 <= found <= max(limit - held, 0)
    assert held > 0 or found > 0
    assert found == 0 or held == 0 or (load.kv_cache_usage < KV_CACHE_HIGH_WATERMARK and load.waiting == 0)


@given(loads, st.integers(1, 299))
def test_who_holds_more_never_takes_more(load: Load, held: int) -> None:
    assert room(load, held + 1) <= room(load, held)


@pytest.mark.parametrize("more", [0.0, 100.0])
def test_longer_answers_leave_less_room(more: float) -> None:
    assert room(Load(avg_output_tokens=800 + more), 0) <= room(Load(), 0)
