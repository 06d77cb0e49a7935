"""The scaling decision, from counts and time alone."""

from __future__ import annotations

from typing import Any

import pytest

from emulator.core.autoscaler import Decision, Member, WorkerState, decide
from emulator.core.job_queue import Load
from emulator.settings import EndpointSettings

NOW = 1000.0


def settings(**values: Any) -> EndpointSettings:
    return EndpointSettings.model_validate({"workersMax": 3, "idleTimeout": 5, **values})


def member(name: str, state: str, since_s: float = 0.0, started_s: float = 100.0) -> Member:
    """A worker that came into its state `since_s` ago, and was started `started_s` ago."""
    return Member(name, WorkerState(state), NOW - since_s, NOW - started_s)


@pytest.mark.parametrize(
    ("waiting", "running", "started"),
    [(0, 0, 0), (1, 0, 1), (4, 0, 1), (5, 0, 2), (2, 3, 2), (9, 0, 3), (1000, 0, 3)],
)
def test_request_count_wants_the_documented_formula(waiting: int, running: int, started: int) -> None:
    rules = settings(scalerType="REQUEST_COUNT", scalerValue=4)
    assert decide(rules, Load(waiting, running, 0), [], NOW) == Decision(start=started)


def test_request_count_counts_the_workers_that_are_coming_up() -> None:
    rules = settings(scalerType="REQUEST_COUNT", scalerValue=4)
    members = [member("a", "initializing"), member("b", "throttled")]
    assert decide(rules, Load(8, 0, 0), members, NOW).start == 0
    assert decide(rules, Load(9, 0, 0), members, NOW).start == 1


@pytest.mark.parametrize(("waited_s", "started"), [(3.9, 0), (4.0, 1), (400.0, 1)])
def test_queue_delay_adds_a_worker_when_a_job_has_waited(waited_s: float, started: int) -> None:
    assert decide(settings(scalerValue=4), Load(1, 0, waited_s), [], NOW).start == started


@pytest.mark.parametrize(("ago_s", "started"), [(3.9, 0), (4.0, 1)])
def test_queue_delay_gives_the_last_worker_time_before_it_adds_another(ago_s: float, started: int) -> None:
    members = [member("a", "initializing", ago_s, ago_s)]
    assert decide(settings(scalerValue=4), Load(5, 0, 60), members, NOW).start == started


def test_queue_delay_adds_nobody_when_nothing_waits() -> None:
    assert decide(settings(scalerValue=4), Load(0, 9, 0), [member("a", "running")], NOW).start == 0


def test_the_minimum_always_runs() -> None:
    assert decide(settings(workersMin=2), Load(0, 0, 0), [member("a", "idle", 99)], NOW) == Decision(start=1)


@pytest.mark.parametrize("scaler", ["QUEUE_DELAY", "REQUEST_COUNT"])
def test_the_maximum_is_never_exceeded_even_by_workers_that_are_leaving(scaler: str) -> None:
    members = [member("a", "running"), member("b", "stopping"), member("c", "unhealthy")]
    rules = settings(scalerType=scaler, scalerValue=1)
    assert decide(rules, Load(100, 1, 100), members, NOW).start == 0
    assert decide(rules, Load(100, 1, 100), members[:2], NOW).start == 1


@pytest.mark.parametrize("scaler", ["QUEUE_DELAY", "REQUEST_COUNT"])
def test_workers_that_idled_long_enough_are_stopped_longest_first(scaler: str) -> None:
    members = [member("a", "idle", 5), member("b", "idle", 4.9), member("c", "idle", 60)]
    rules = settings(scalerType=scaler)
    assert decide(rules, Load(0, 0, 0), members, NOW).stop == ("c", "a")


def test_idle_workers_are_kept_down_to_the_minimum() -> None:
    members = [member("a", "idle", 50), member("b", "idle", 60)]
    assert decide(settings(workersMin=1), Load(0, 0, 0), members, NOW).stop == ("b",)


def test_request_count_keeps_idle_workers_that_its_formula_wants() -> None:
    members = [member("a", "running"), member("b", "idle", 60)]
    rules = settings(scalerType="REQUEST_COUNT", scalerValue=1)
    assert decide(rules, Load(0, 2, 0), members, NOW).stop == ()
    assert decide(rules, Load(0, 1, 0), members, NOW).stop == ("b",)


def test_only_idle_workers_are_stopped() -> None:
    members = [member(state, state, 60) for state in ("running", "stopping", "throttled", "unhealthy")]
    assert decide(settings(), Load(0, 0, 0), members, NOW).stop == ()


def test_a_start_above_the_limit_is_given_up() -> None:
    members = [member("a", "initializing", 419.9), member("b", "initializing", 420)]
    assert decide(settings(), Load(0, 0, 0), members, NOW).overdue == ("b",)


def test_runpod_init_timeout_raises_the_limit() -> None:
    rules = settings(env={"RUNPOD_INIT_TIMEOUT": "800"})
    members = [member("a", "initializing", 799.9), member("b", "initializing", 800)]
    assert decide(rules, Load(0, 0, 0), members, NOW).overdue == ("b",)
