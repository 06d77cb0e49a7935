"""Fault rules: which requests they apply to."""

from __future__ import annotations

from emulator.core.faults import Faults, FaultSettings


def sequence(seed: int, count: int = 200, rate: float = 0.3, route: str = "run") -> list[bool]:
    rules = {"seed": seed, "rules": [{"kind": "drop", "route": route, "rate": rate}]}
    faults = Faults(FaultSettings.model_validate(rules))
    return [bool(faults.match("ep", "run")) for _ in range(count)]


def test_the_same_seed_injects_the_same_faults() -> None:
    assert sequence(7) == sequence(7)
    assert sequence(7) != sequence(8)


def test_faults_are_injected_at_the_given_rate() -> None:
    assert 0.25 < sum(sequence(1, 2000)) / 2000 < 0.35
    assert not any(sequence(1, rate=0))
    assert all(sequence(1, rate=1))


def test_requests_to_other_routes_do_not_change_a_rules_sequence() -> None:
    rules = {"seed": 7, "rules": [{"kind": "drop", "route": "run", "rate": 0.3}]}
    faults = Faults(FaultSettings.model_validate(rules))
    matched = []
    for _ in range(200):
        assert faults.match("ep", "status") == []
        matched.append(bool(faults.match("ep", "run")))
    assert matched == sequence(7)


def test_a_rule_applies_up_to_its_times_and_only_to_its_endpoint() -> None:
    rules = {"rules": [{"kind": "drop", "times": 2, "endpoint": "ep"}]}
    faults = Faults(FaultSettings.model_validate(rules))
    assert [bool(faults.match(endpoint, "run")) for endpoint in ("other", "ep", "ep", "ep")] == [
        False,
        True,
        True,
        False,
    ]
