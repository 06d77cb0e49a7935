"""Event loops whose time jumps: what sleeps for an hour is awake at once, and who waits for nothing is found out."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

# A turn takes so long: where time stood still, who waits for the rest of a rounding error would wait forever.
_TURN_S = 1e-6


class _JumpingSelector(selectors.DefaultSelector):
    """Where a loop would sleep, the time goes on instead."""

    now_s = 0.0

    def now(self) -> float:
        return self.now_s

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task waits, and nothing will ever wake one")
        self.now_s += max(timeout, _TURN_S)
        return super().select(0)


@contextmanager
def runner() -> Iterator[asyncio.Runner]:
    """An event loop in virtual time, which `time.monotonic()` tells within the block.

    What runs on it and can never end raises a `RuntimeError`.
    """
    selector = _JumpingSelector()
    with (
        mock.patch.object(time, "monotonic", selector.now),
        asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as opened,
    ):
        yield opened
