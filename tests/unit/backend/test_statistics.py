"""Statistics of the engine: kept per engine core, and correct even if vLLM does not report an event."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.backend import compat
from engine.backend.statistics import MAX_FINISHED_ENTRIES, Statistics
from engine.backend.vllm_engine import VLLMEngine
from engine.queue.admission import Admission

CACHE_TOKENS = 4096


def engine_with(*tokens: int) -> SimpleNamespace:
    """Return an engine whose requests have so far generated these numbers of tokens."""
    states = {
        str(number): SimpleNamespace(stats=SimpleNamespace(num_generation_tokens=one))
        for number, one in enumerate(tokens)
    }
    return SimpleNamespace(output_processor=SimpleNamespace(request_states=states))


@pytest.mark.parametrize("cancelled", [0, 5, 20, 100])
def test_cancelled_requests_do_not_add_slots(cancelled: int) -> None:
    """VLLM does not report their end, and the engine is never idle: a long request runs at the same time."""
    engine = engine_with(*[0] * 8)
    statistics = Statistics(lambda: compat.output_tokens(engine))
    statistics.avg_prompt_tokens, statistics.avg_output_tokens = 50.0, 400.0
    for _ in range(cancelled):
        statistics.generation_tokens += 200
        statistics.on_scheduler_stats(0, 1, 0, 0.05)
        statistics.on_scheduler_stats(0, 2, 0, 0.05)
    statistics.on_scheduler_stats(0, 8, 0, 8 * 50 / CACHE_TOKENS)

    assert statistics.avg_running_output_tokens == 0
    assert Admission(statistics, 256, CACHE_TOKENS, 2048).available_slots(8) == 6


def test_output_tokens_of_running_requests_are_read_from_the_engine() -> None:
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


def test_the_step_time_is_that_of_the_slowest_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("engine.backend.statistics.CLOCK", SimpleNamespace(now=lambda: now))
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


def test_statistics_are_zero_before_the_first_step() -> None:
    statistics = Statistics()

    assert (statistics.running, statistics.waiting, statistics.kv_cache_usage) == (0, 0, 0.0)
    assert (statistics.stepped_at, statistics.step_s, statistics.avg_running_output_tokens) == (0.0, 0.0, 0.0)


def test_unread_entries_of_finished_requests_are_limited() -> None:
    statistics = Statistics()
    for number in range(MAX_FINISHED_ENTRIES + 10):
        statistics.on_finished(str(number), 1, 1)

    assert len(statistics.finished) == MAX_FINISHED_ENTRIES


def test_the_token_counts_of_a_job_are_those_of_its_own_requests() -> None:
    """Requests of a job whose id contains its own are not counted."""
    engine = object.__new__(VLLMEngine)  # Its constructor would load the engine.
    engine.statistics = Statistics()
    for tokens, request_id in enumerate(
        ["chatcmpl-job-1-0a1b2c3d", "cmpl-job-1-0-0a1b2c3d", "cmpl-job-1-1-0a1b2c3d", "cmpl-job-11-0-0a1b2c3d",
         "chatcmpl-ajob-1-0a1b2c3d", "job-1", "chatcmpl-job-1_0"]
    ):  # fmt: skip
        engine.statistics.on_finished(request_id, 10, tokens)

    assert engine.pop_token_counts("job-1") == (50, 0 + 1 + 2 + 5 + 6)
    assert engine.pop_token_counts("job-1") is None
    assert engine.pop_token_counts("job-11") == (10, 3)
