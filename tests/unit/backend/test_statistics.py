"""What the engine says of itself: kept apart by engine, and never added up from what vLLM may not tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.backend import compat
from engine.backend.statistics import MAX_FINISHED_ENTRIES, Statistics
from engine.backend.vllm_engine import VLLMEngine
from engine.queue.admission import Admission

CACHE_TOKENS = 4096


def engine_with(*tokens: int) -> SimpleNamespace:
    """VLLM's engine, as far as it knows what its requests have been answered."""
    states = {
        str(number): SimpleNamespace(stats=SimpleNamespace(num_generation_tokens=one))
        for number, one in enumerate(tokens)
    }
    return SimpleNamespace(output_processor=SimpleNamespace(request_states=states))


@pytest.mark.parametrize("cancelled", [0, 5, 20, 100])
def test_cancelled_requests_do_not_make_room_for_more(cancelled: int) -> None:
    """VLLM reports no end of them, and the engine is never idle: a long request runs beside them."""
    young = engine_with(*[0] * 8)
    statistics = Statistics(lambda: compat.output_tokens(young))
    statistics.avg_prompt_tokens, statistics.avg_output_tokens = 50.0, 400.0
    for _ in range(cancelled):
        statistics.generation_tokens += 200
        statistics.on_scheduler_stats(0, 1, 0, 0.05)
        statistics.on_scheduler_stats(0, 2, 0, 0.05)
    statistics.on_scheduler_stats(0, 8, 0, 8 * 50 / CACHE_TOKENS)

    assert statistics.avg_running_output_tokens == 0
    assert Admission(statistics, 256, CACHE_TOKENS, 2048).available_slots(8) == 6


def test_what_running_requests_have_been_answered_is_asked_of_the_engine() -> None:
    engine = engine_with(10, 20, 0)
    statistics = Statistics(lambda: compat.output_tokens(engine))
    statistics.on_scheduler_stats(0, 3, 0, 0.1)

    assert statistics.avg_running_output_tokens == 10
    engine.output_processor.request_states.pop("1")  # It was aborted.
    assert statistics.avg_running_output_tokens == pytest.approx(10 / 3)


def test_an_idle_engine_does_not_hide_a_full_one() -> None:
    statistics = Statistics()
    statistics.on_scheduler_stats(0, 60, 5, 0.95)
    statistics.on_scheduler_stats(1, 1, 0, 0.01)

    assert (statistics.running, statistics.waiting) == (61, 5)
    assert statistics.kv_cache_usage == pytest.approx(0.48)
    assert Admission(statistics, 256, 2 * 100_000, 8192).available_slots(61) == 0


def test_the_slowest_of_the_engines_says_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("engine.backend.statistics.time.monotonic", lambda: now)
    statistics = Statistics()
    for number in range(200):
        now = 100.0 + number * 0.01
        statistics.on_step(0)
        statistics.on_scheduler_stats(0, 4, 0, 0.1)
        if number % 2:
            statistics.on_step(1)
            statistics.on_scheduler_stats(1, 4, 0, 0.1)

    assert statistics.step_s == pytest.approx(0.02, abs=0.001)
    assert statistics.stepped_at == now


def test_before_its_first_step_an_engine_has_made_none() -> None:
    statistics = Statistics()

    assert (statistics.running, statistics.waiting, statistics.kv_cache_usage) == (0, 0, 0.0)
    assert (statistics.stepped_at, statistics.step_s, statistics.avg_running_output_tokens) == (0.0, 0.0, 0.0)


def test_ends_that_nobody_asks_for_do_not_gather() -> None:
    statistics = Statistics()
    for number in range(MAX_FINISHED_ENTRIES + 10):
        statistics.on_finished(str(number), 1, 1)

    assert len(statistics.finished) == MAX_FINISHED_ENTRIES


def test_the_tokens_of_a_job_are_those_of_its_own_requests() -> None:
    """Not those of a job whose id begins, or ends, like its own."""
    engine = object.__new__(VLLMEngine)  # Its constructor would load the engine.
    engine.statistics = Statistics()
    for tokens, request_id in enumerate(
        ["chatcmpl-job-1-0a1b2c3d", "cmpl-job-1-0-0a1b2c3d", "cmpl-job-1-1-0a1b2c3d", "cmpl-job-11-0-0a1b2c3d",
         "chatcmpl-ajob-1-0a1b2c3d", "job-1"]
    ):  # fmt: skip
        engine.statistics.on_finished(request_id, 10, tokens)

    assert engine.pop_token_counts("job-1") == (40, 0 + 1 + 2 + 5)
    assert engine.pop_token_counts("job-1") is None
    assert engine.pop_token_counts("job-11") == (10, 3)
