"""The simulation of an endpoint, on traces that are small enough to reckon by hand; and next to the emulator."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.advisor import simulation
from bench.advisor.simulation import EndpointPlan, Outcome, simulate
from bench.advisor.trace import Trace
from bench.advisor.worker_profile import WorkerProfile
from tests.advisor_scenarios import SCENARIOS, ttft_s
from tests.emulated_endpoint import run_emulated

# 10 tokens a second, shared by all requests, and a first token after half a second.
WORKER = WorkerProfile({1: 10.0}, {1: 0.5}, (40.0,), stop_s=2.0)
READY = WorkerProfile({1: 10.0}, {1: 0.5}, (0.0,), stop_s=2.0)


def run(
    trace: list[tuple[float, int]], worker: WorkerProfile = WORKER, duration_s: float = 0, **plan: object
) -> Outcome:
    arrivals_s, tokens = [at_s for at_s, _ in trace], [count for _, count in trace]
    return simulate(worker, Trace(arrivals_s, tokens, duration_s), EndpointPlan(**plan))  # type: ignore[arg-type]


def test_the_first_request_waits_for_the_queue_delay_the_start_and_its_first_token() -> None:
    outcome = run([(10.0, 100)], scaler_type="QUEUE_DELAY", scaler_value=4, workers_max=1)
    assert outcome.ttfts_s == [pytest.approx(4 + 40 + 0.5)]
    assert (outcome.cold_starts, outcome.cold_requests, outcome.max_workers) == (1, 1, 1)
    assert outcome.ended_s == pytest.approx(10 + 4 + 40 + 10)


def test_request_count_starts_a_worker_at_its_next_tick() -> None:
    outcome = run([(10.05, 100)], scaler_type="REQUEST_COUNT", scaler_value=1, workers_max=1)
    assert outcome.ttfts_s == [pytest.approx(0.05 + 40 + 0.5)]


def test_queue_delay_adds_a_worker_each_time_the_delay_has_passed_again() -> None:
    assert run([(0.0, 10)] * 9, scaler_value=4, workers_max=9, concurrency=1).max_workers == 9
    # The first starts after 4 s and is ready at 34 s. Until then seven more start, at 8, 12, ... and 32 s.
    quick = WorkerProfile({1: 10.0}, {1: 0.5}, (30.0,))
    assert run([(0.0, 10)] * 9, quick, scaler_value=4, workers_max=9, concurrency=16).max_workers == 8


def test_requests_share_a_worker_and_are_quicker_once_others_have_ended() -> None:
    """The first has 50 tokens after 5 s. Then both get 5 tokens a second until the second has its 25, at 10 s."""
    outcome = run([(0.0, 100), (5.0, 25)], READY, workers_min=1, workers_max=1)
    assert outcome.ended_s == pytest.approx(10 + 25 / 10)
    assert outcome.ttfts_s == [0.5, 0.5]


def test_a_request_that_comes_later_can_end_earlier() -> None:
    """The second ends at 2 s. The first has 50 tokens at 6 s, and 60 at 8 s, when the third has its 10."""
    outcome = run([(0.0, 100), (0.0, 10), (6.0, 10)], READY, workers_min=1, workers_max=1, concurrency=2)
    assert outcome.ended_s == pytest.approx(8 + 40 / 10)


def test_the_throughput_is_interpolated_and_stays_behind_the_last_point() -> None:
    worker = WorkerProfile({2: 20.0, 4: 30.0}, {1: 0.1, 3: 0.3})
    assert worker.rates(6) == [0.0, 10.0, 10.0, pytest.approx(25 / 3), 7.5, 6.0, 5.0]
    assert worker.ttfts_s(4) == [0.0, 0.1, pytest.approx(0.2), 0.3, 0.3]


def test_no_more_than_the_concurrency_runs_on_a_worker() -> None:
    outcome = run([(1.0, 10)] * 3, READY, workers_min=1, workers_max=1, concurrency=1)
    assert outcome.ttfts_s == [0.5, pytest.approx(1.5), pytest.approx(2.5)]
    assert (outcome.max_waiting, outcome.max_in_flight, outcome.cold_requests) == (2, 3, 0)


def test_a_worker_is_paid_from_its_start_to_its_exit() -> None:
    """The start takes 40 s, the answer 10, the idle timeout 5, and the exit 2."""
    outcome = run([(10.0, 100)], duration_s=600, scaler_type="REQUEST_COUNT", scaler_value=1, idle_timeout_s=5)
    assert outcome.gpu_s == pytest.approx(40 + 10 + 5 + 2, abs=0.11)
    assert outcome.active_gpu_s == 0


def test_workers_of_the_minimum_are_paid_all_the_time() -> None:
    outcome = run([(10.0, 100)], duration_s=600, workers_min=2, workers_max=2)
    assert (outcome.gpu_s, outcome.active_gpu_s) == (1200, 1200)
    assert outcome.cold_starts == 0


def test_a_worker_that_takes_a_request_in_time_is_not_stopped() -> None:
    trace = [(10.0, 10), (15.5, 10), (21.0, 10)]
    assert run(trace, READY, scaler_type="REQUEST_COUNT", scaler_value=9, idle_timeout_s=5).cold_starts == 1
    assert run(trace, READY, scaler_type="REQUEST_COUNT", scaler_value=9, idle_timeout_s=3).cold_starts == 3


def test_a_full_queue_refuses_requests() -> None:
    """As the platform does: a request is refused while more than 500 wait for each worker of the maximum."""
    outcome = run([(0.0, 1)] * 600, scaler_type="REQUEST_COUNT", scaler_value=1, workers_max=1)
    assert (len(outcome.ttfts_s), outcome.rejected) == (501, 99)


def test_without_a_worker_no_request_would_ever_end() -> None:
    with pytest.raises(ValueError, match="workers_max=0"):
        run([(0.0, 1)], workers_max=0)
    assert run([], workers_max=0, duration_s=60).gpu_s == 0


def test_samples_show_the_state_from_time_to_time() -> None:
    trace = Trace([0.0] * 3, [90] * 3, 20.0)
    plan = EndpointPlan(workers_min=1, workers_max=1, concurrency=2)
    samples = simulate(READY, trace, plan, sample_s=10).samples
    assert [sample[1:] for sample in samples] == [(3, 0, 0), (1, 2, 1), (0, 1, 1)]


@given(
    trace=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 300)), max_size=30),
    scaler=st.sampled_from(["QUEUE_DELAY", "REQUEST_COUNT"]),
    value=st.sampled_from([1, 2.5]),
    minimum=st.integers(0, 1),
)
def test_the_scaler_misses_nothing_when_it_sleeps(
    trace: list[tuple[int, int]], scaler: str, value: float, minimum: int
) -> None:
    """It decides only when something has happened or a time-out ends; with each tick, the outcome is the same."""
    # No wait ends at a tick, where rounding would decide.
    requests = [(0.0371 + at / 10, tokens) for at, tokens in sorted(trace)]
    worker = WorkerProfile({1: 10.07, 4: 25.03}, {1: 0.5}, (7.3113,), stop_s=1.0)

    def outcome() -> Outcome:
        plan = EndpointPlan(scaler, value, 2, 4.0, minimum)
        return simulate(worker, Trace([at for at, _ in requests], [tokens for _, tokens in requests], 90.0), plan)

    expected = outcome()
    with mock.patch.object(simulation, "next_change_s", lambda *arguments: arguments[-1]):
        found = outcome()
    assert found.ttfts_s == pytest.approx(expected.ttfts_s)
    assert found.gpu_s == pytest.approx(expected.gpu_s)
    assert (found.cold_starts, found.cold_requests) == (expected.cold_starts, expected.cold_requests)


@pytest.mark.parametrize(
    "name", ["zero to one, QUEUE_DELAY", "burst from zero, REQUEST_COUNT", "one at a time, rarely"]
)
def test_the_emulator_takes_as_long_and_costs_as_much(name: str) -> None:
    """tests/soak/test_advise.py compares all scenarios. These do not depend on which worker takes a request."""
    scenario = SCENARIOS[name]
    simulated = simulate(scenario.worker, scenario.trace, scenario.plan)
    emulated = run_emulated(scenario.worker, scenario.trace, scenario.plan)
    assert ttft_s(simulated) == pytest.approx(ttft_s(emulated), rel=0.15)
    assert simulated.gpu_s == pytest.approx(emulated.gpu_s, rel=0.15)
    assert (simulated.cold_requests, simulated.rejected) == (emulated.cold_requests, emulated.rejected)
