"""The rate limit, with a clock of the test."""

from __future__ import annotations

import pytest

from emulator.control_plane.quotas import Quotas
from emulator.errors import QuotaExceededError
from tests.unit.emulator.fakes import FakeClock


def test_a_window_begins_with_its_first_request_and_then_opens_again() -> None:
    clock = FakeClock()
    quotas = Quotas({"day": 5, "minute": 2}, clock)
    quotas.admit()
    clock.now += 20
    quotas.admit()
    assert quotas.headers() == {
        "RateLimit-Policy": '"minute";q=2;w=60, "day";q=5;w=86400',
        "RateLimit": '"minute";r=0;t=40, "day";r=3;t=86380',
    }
    with pytest.raises(QuotaExceededError, match="the minute window") as refusal:
        quotas.admit()
    assert refusal.value.retry_after_s == 40
    clock.now += 40
    quotas.admit()
    assert '"minute";r=1;t=60, "day";r=2' in quotas.headers()["RateLimit"]


def test_a_refused_request_counts_for_no_window() -> None:
    clock = FakeClock()
    quotas = Quotas({"minute": 1, "hour": 2}, clock)
    quotas.admit()
    for _ in range(9):
        with pytest.raises(QuotaExceededError):
            quotas.admit()
    clock.now += 60
    quotas.admit()
    with pytest.raises(QuotaExceededError, match="the minute window"):
        quotas.admit()
    clock.now += 60
    with pytest.raises(QuotaExceededError, match="the hour window") as refusal:
        quotas.admit()
    assert refusal.value.retry_after_s == 3600 - 120
