"""The control plane's rate limit: one quota for each window, and the headers that say what is left of it.

The headers are structured fields, as the description shows: `"minute";q=60;w=60, "hour";...` and
`"minute";r=59;t=60, ...`. A window begins with its first request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from emulator.control_plane.settings import WINDOWS, Window
from emulator.errors import QuotaExceededError

_SECONDS: Final[dict[Window, int]] = {"minute": 60, "hour": 3600, "day": 86_400}


class Quotas:
    """Counts the requests of all API keys together: the limit is the user's.

    Args:
        limits: requests in each window; None: no limit, and no headers.
        clock: monotonic time in seconds.
    """

    def __init__(self, limits: Mapping[Window, int] | None, clock: Callable[[], float]) -> None:
        self._limits = {window: limits[window] for window in WINDOWS if window in limits} if limits else {}
        self._clock = clock
        self._ends: dict[Window, float] = {}
        self._counts: dict[Window, int] = {}

    def admit(self) -> None:
        """Count a request.

        Raises:
            QuotaExceededError: a window's quota is used up; the request is not counted.
        """
        self._open_windows()
        for window, limit in self._limits.items():
            if self._counts[window] >= limit:
                raise QuotaExceededError(window, self._remaining_s(window))
        for window in self._limits:
            self._counts[window] += 1

    def headers(self) -> dict[str, str]:
        """Return the headers `RateLimit-Policy` and `RateLimit`."""
        self._open_windows()
        if not self._limits:
            return {}
        policy = [f'"{window}";q={limit};w={_SECONDS[window]}' for window, limit in self._limits.items()]
        state = [
            f'"{window}";r={limit - self._counts[window]};t={self._remaining_s(window)}'
            for window, limit in self._limits.items()
        ]
        return {"RateLimit-Policy": ", ".join(policy), "RateLimit": ", ".join(state)}

    def _open_windows(self) -> None:
        now = self._clock()
        for window in self._limits:
            if now >= self._ends.get(window, -math.inf):
                self._ends[window], self._counts[window] = now + _SECONDS[window], 0

    def _remaining_s(self, window: Window) -> int:
        return math.ceil(self._ends[window] - self._clock())
