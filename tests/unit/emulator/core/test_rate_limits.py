"""The rate limits."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from emulator.core.rate_limits import RateLimiter
from emulator.errors import TooManyRequestsError
from tests.unit.emulator.fakes import FakeClock


def admitted(limiter: RateLimiter, operation: str) -> bool:
    try:
        with limiter.admit(operation):
            return True
    except TooManyRequestsError:
        return False


def test_requests_above_the_rate_are_rejected_until_the_window_has_passed() -> None:
    clock = FakeClock()
    limiter = RateLimiter(clock)
    assert [admitted(limiter, "cancel") for _ in range(101)] == [True] * 100 + [False]
    clock.now += 9.9
    assert not admitted(limiter, "cancel")
    clock.now += 0.1
    assert admitted(limiter, "cancel")


def test_concurrent_requests_above_the_limit_are_rejected_until_one_ends() -> None:
    limiter = RateLimiter(FakeClock())
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(limiter.admit("cancel"))
        assert not admitted(limiter, "cancel")
        assert admitted(limiter, "run")
    assert admitted(limiter, "cancel")


def test_a_failed_request_no_longer_counts_as_concurrent() -> None:
    limiter = RateLimiter(FakeClock())
    for _ in range(30):
        with pytest.raises(ValueError, match="broke"), limiter.admit("cancel"):
            raise ValueError("broke")
    assert admitted(limiter, "cancel")


def test_operations_without_a_documented_limit_are_unlimited() -> None:
    limiter = RateLimiter(FakeClock())
    assert all(admitted(limiter, "retry") for _ in range(5000))
