"""The affinity header's forms."""

from __future__ import annotations

import pytest

from emulator.balancer.affinity import Affinity


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", Affinity()),
        ("pod-1", Affinity("pod-1")),
        ("strict pod-1", Affinity("pod-1", is_strict=True)),
        (" strict-resume  pod-1 ", Affinity("pod-1", is_strict=True, resumes=True)),
        ("strict", Affinity("strict")),
    ],
)
def test_a_value_says_which_worker_and_whether_another_will_do(value: str, expected: Affinity) -> None:
    assert Affinity.parse(value) == expected
