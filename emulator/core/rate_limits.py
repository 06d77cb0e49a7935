"""The documented rate limits of an endpoint's operations.

Source: docs.runpod.io, "Send API requests", "Rate limits and quotas".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from emulator.errors import TooManyRequestsError

WINDOW_S: Final = 10.0


@dataclass(frozen=True)
class RateLimit:
    """Maximum number of requests in ten seconds, and of concurrent requests (None: no maximum)."""

    requests: int
    concurrent: int | None


RATE_LIMITS: Final = {
    "runsync": RateLimit(2000, 400),
    "run": RateLimit(1000, 200),
    "status": RateLimit(2000, 400),
    "stream": RateLimit(2000, 400),
    "cancel": RateLimit(100, 20),
    "purge-queue": RateLimit(2, None),
    "openai": RateLimit(2000, 400),
}


class RateLimiter:
    """Counts one endpoint's requests, separately for each operation."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent: dict[str, deque[float]] = {name: deque() for name in RATE_LIMITS}
        self._running = dict.fromkeys(RATE_LIMITS, 0)

    @contextmanager
    def admit(self, operation: str) -> Iterator[None]:
        """Count a request while it runs.

        Raises:
            TooManyRequestsError: it exceeds a limit.
        """
        limit = RATE_LIMITS.get(operation)
        if limit is None:
            yield
            return
        now = self._clock()
        recent = self._recent[operation]
        while recent and now - recent[0] >= WINDOW_S:
            recent.popleft()
        if len(recent) >= limit.requests:
            raise TooManyRequestsError(f"/{operation}: more than {limit.requests} requests in {WINDOW_S:g} s")
        if limit.concurrent is not None and self._running[operation] >= limit.concurrent:
            raise TooManyRequestsError(f"/{operation}: more than {limit.concurrent} concurrent requests")
        recent.append(now)
        self._running[operation] += 1
        try:
            yield
        finally:
            self._running[operation] -= 1
