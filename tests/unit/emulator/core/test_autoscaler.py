"""The scaling decision."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.core.autoscaler import TICK_INTERVAL_S, ScalingDecision, WorkerCounts, decide, next_change_s, scale
from emulator.core.work import QueueLoad
from emulator.core.worker import FleetWorker, WorkerState
from emulator.settings import EndpointSettings, FleetSettings
from emulator.spirit.settings import SpiritEndpointSettings

NOW = 1000.0


def settings(**values: Any) -> EndpointSettings:
    return EndpointSettings.model_validate({"workersMax": 3, "idleTimeout": 5, **values})


def worker(name: str, state: str, state_s: float = 0.0, started_s: float = 100.0) -> FleetWorker:
    """Return a worker that entered its state `state_s` ago, and was started `started_s` ago."""
    return FleetWorker(name, WorkerState(state), NOW - started_s, NOW - state_s, NOW)


@pytest.mark.parametrize(
    ("waiting", "running", "started"),
    [(0, 0, 0), (1, 0, 1), (4, 0, 1), (5, 0, 2), (2, 3, 2), (9, 0, 3), (1000, 0, 3)],
)
def test_request_count_follows_the_documented_formula(waiting: int, running: int, started: int) -> None:
    rules = settings(scalerType="REQUEST_COUNT", scalerValue=4)
    assert decide(rules, QueueLoad(waiting, running, 0), [], NOW) == ScalingDecision(start=started)


def test_request_count_includes_workers_that_are_starting() -> None:
    rules = settings(scalerType="REQUEST_COUNT", scalerValue=4)
    workers = [worker("a", "initializing"), worker("b", "initializing")]
    assert decide(rules, QueueLoad(8, 0, 0), workers, NOW).start == 0
    assert decide(rules, QueueLoad(9, 0, 0), workers, NOW).start == 1


@pytest.mark.parametrize(("waited_s", "started"), [(3.9, 0), (4.0, 1), (400.0, 1)])
def test_queue_delay_adds_a_worker_when_a_job_has_waited(waited_s: float, started: int) -> None:
    assert decide(settings(scalerValue=4), QueueLoad(1, 0, waited_s), [], NOW).start == started


@pytest.mark.parametrize(("ago_s", "started"), [(3.9, 0), (4.0, 1)])
def test_queue_delay_waits_after_the_last_start_before_it_adds_another_worker(ago_s: float, started: int) -> None:
    workers = [worker("a", "initializing", ago_s, ago_s)]
    assert decide(settings(scalerValue=4), QueueLoad(5, 0, 60), workers, NOW).start == started


def test_queue_delay_adds_no_worker_without_waiting_jobs() -> None:
    assert decide(settings(scalerValue=4), QueueLoad(0, 9, 0), [worker("a", "running")], NOW).start == 0


def test_the_minimum_number_of_workers_is_started_without_load() -> None:
    assert decide(settings(workersMin=2), QueueLoad(0, 0, 0), [worker("a", "idle", 99)], NOW) == ScalingDecision(
        start=1
    )


@pytest.mark.parametrize("scaler", ["QUEUE_DELAY", "REQUEST_COUNT"])
def test_stopping_and_unhealthy_workers_count_towards_the_maximum(scaler: str) -> None:
    workers = [worker("a", "running"), worker("b", "stopping"), worker("c", "unhealthy")]
    rules = settings(scalerType=scaler, scalerValue=1)
    assert decide(rules, QueueLoad(100, 1, 100), workers, NOW).start == 0
    assert decide(rules, QueueLoad(100, 1, 100), workers[:2], NOW).start == 1


@pytest.mark.parametrize("scaler", ["QUEUE_DELAY", "REQUEST_COUNT"])
def test_workers_are_stopped_after_the_idle_timeout_longest_idle_first(scaler: str) -> None:
    workers = [worker("a", "idle", 5), worker("b", "idle", 4.9), worker("c", "idle", 60)]
    rules = settings(scalerType=scaler)
    assert decide(rules, QueueLoad(0, 0, 0), workers, NOW).stop == ("c", "a")


def test_idle_workers_are_not_stopped_below_the_minimum() -> None:
    workers = [worker("a", "idle", 50), worker("b", "idle", 60)]
    assert decide(settings(workersMin=1), QueueLoad(0, 0, 0), workers, NOW).stop == ("b",)


def test_request_count_keeps_idle_workers_that_its_formula_requires() -> None:
    workers = [worker("a", "running"), worker("b", "idle", 60)]
    rules = settings(scalerType="REQUEST_COUNT", scalerValue=1)
    assert decide(rules, QueueLoad(0, 2, 0), workers, NOW).stop == ()
    assert decide(rules, QueueLoad(0, 1, 0), workers, NOW).stop == ("b",)


def test_only_idle_workers_are_stopped() -> None:
    workers = [worker(state, state, 60) for state in ("running", "stopping", "initializing", "unhealthy")]
    assert decide(settings(), QueueLoad(0, 0, 0), workers, NOW).stop == ()


@pytest.mark.parametrize("scaler", ["QUEUE_DELAY", "REQUEST_COUNT"])
def test_throttled_workers_do_not_count_towards_the_minimum(scaler: str) -> None:
    rules = settings(scalerType=scaler, workersMin=1)
    workers = [worker("a", "throttled"), worker("b", "idle", 60)]
    assert decide(rules, QueueLoad(0, 0, 0), workers, NOW) == ScalingDecision()
    assert decide(rules, QueueLoad(0, 0, 0), workers[:1], NOW).start == 1


@pytest.mark.parametrize("scaler", ["QUEUE_DELAY", "REQUEST_COUNT"])
def test_throttled_workers_are_removed_when_no_job_waits_for_them(scaler: str) -> None:
    rules = settings(scalerType=scaler, scalerValue=1)
    workers = [worker("a", "throttled", 60)]
    assert decide(rules, QueueLoad(0, 0, 0), workers, NOW).stop == ("a",)
    assert decide(rules, QueueLoad(1, 0, 0), workers, NOW).stop == ()
    assert decide(settings(scalerType=scaler, workersMin=1), QueueLoad(0, 0, 0), workers, NOW).stop == ()


def test_a_worker_that_is_not_ready_in_time_has_timed_out() -> None:
    workers = [worker("a", "initializing", 419.9), worker("b", "initializing", 420)]
    assert decide(settings(), QueueLoad(0, 0, 0), workers, NOW).init_timed_out == ("b",)


def test_runpod_init_timeout_overrides_the_init_timeout() -> None:
    rules = settings(env={"RUNPOD_INIT_TIMEOUT": "800"})
    workers = [worker("a", "initializing", 799.9), worker("b", "initializing", 800)]
    assert decide(rules, QueueLoad(0, 0, 0), workers, NOW).init_timed_out == ("b",)


@pytest.mark.parametrize(
    ("waiting", "starting", "started"), [(0, 0, 0), (3, 0, 0), (4, 0, 1), (8, 0, 2), (8, 1, 1), (8, 2, 0)]
)
def test_queue_length_adds_a_worker_for_so_many_waiting_tasks_less_those_that_start(
    waiting: int, starting: int, started: int
) -> None:
    """A worker that runs tasks does not count: what waits is what it has no room for."""
    document = {"workersMax": 9, "scalerType": "QUEUE_LENGTH", "scalerValue": 4}
    rules = SpiritEndpointSettings.model_validate(document)
    workers = [worker("running", "running"), *(worker(f"{number}", "initializing") for number in range(starting))]
    assert decide(rules, QueueLoad(waiting, 1, 99), workers, NOW).start == started


def test_stale_workers_serve_no_more_but_keep_their_places() -> None:
    rules = settings(workersMin=1, workersMax=2)
    stale = [worker("a", "running"), worker("b", "running")]
    for one in stale:
        one.is_stale = True
    assert decide(rules, QueueLoad(0, 2, 0), stale, NOW).start == 0
    assert decide(rules, QueueLoad(0, 1, 0), stale[:1], NOW).start == 1


@st.composite
def fleets(draw: st.DrawFn) -> WorkerCounts:
    ages_s = draw(st.lists(st.floats(0, 10), max_size=4))
    idle = {f"{number}": NOW - age_s for number, age_s in enumerate(sorted(ages_s, reverse=True))}
    starting = draw(st.integers(0, 2))
    count = len(idle) + starting
    return WorkerCounts(count, count, starting, NOW - draw(st.floats(0, 10)), idle)


@given(
    scaler=st.sampled_from(["QUEUE_DELAY", "REQUEST_COUNT", "QUEUE_LENGTH"]),
    value=st.sampled_from([0.5, 1, 4]),
    minimum=st.integers(0, 2),
    waits_s=st.none() | st.floats(0, 10),
    workers=fleets(),
)
def test_nothing_is_decided_before_the_next_change(
    scaler: str, value: float, minimum: int, waits_s: float | None, workers: WorkerCounts
) -> None:
    """A caller that does nothing until then misses no decision, however long it waits."""
    rules = FleetSettings.model_validate(
        {"workersMin": minimum, "workersMax": 9, "idleTimeout": 5, "scalerType": scaler, "scalerValue": value}
    )

    def load(now_s: float) -> QueueLoad:
        return QueueLoad(int(waits_s is not None), 3, 0 if waits_s is None else waits_s + now_s - NOW)

    nothing = (0, ())
    change_s = next_change_s(rules, load(NOW), workers, NOW)
    if scale(rules, load(NOW), workers, NOW) == nothing:
        ticks = (NOW + tick * TICK_INTERVAL_S for tick in range(200))
        before = [now_s for now_s in ticks if now_s < change_s]
        assert [scale(rules, load(now_s), workers, now_s) for now_s in before] == [nothing] * len(before)


def test_the_next_change_is_the_end_of_a_wait() -> None:
    rules = settings(scalerValue=4)
    idle = WorkerCounts(1, 1, 0, NOW - 60, {"a": NOW - 2})
    assert next_change_s(rules, QueueLoad(0, 0, 0), idle, NOW) == NOW + 3
    assert next_change_s(rules, QueueLoad(1, 0, 3), WorkerCounts(1, 1, 1, NOW - 2), NOW) == NOW + 2
    assert next_change_s(rules, QueueLoad(0, 1, 0), WorkerCounts(1, 1, 0, NOW - 2), NOW) == float("inf")
