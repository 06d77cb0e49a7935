"""Event loops in virtual time: a sleep of an hour ends at once, and a wait that can never end is an error."""

from __future__ import annotations

import asyncio
import functools
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec
from unittest import mock

P = ParamSpec("P")

# Time that one turn of the loop takes. If time stood still, a wait for the rest of a rounding error would never end.
_TURN_S = 1e-6


class _JumpingSelector(selectors.DefaultSelector):
    """Advances the time where a loop would sleep."""

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
    """Yield an event loop in virtual time; `time.monotonic()` returns that time within the block.

    Raises:
        RuntimeError: what runs on the loop can never end.
    """
    selector = _JumpingSelector()
    with (
        mock.patch.object(time, "monotonic", selector.now),
        asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as opened,
    ):
        yield opened


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make a test of a coroutine function; it runs on a loop in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with runner() as opened:
            opened.run(test(*args, **kwargs))

    return run
