"""Event loops in virtual time: a sleep of an hour ends at once, and a wait that can never end is an error.

The process can be frozen in it: time passes, and nothing runs.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ParamSpec
from unittest import mock

from engine.run_clock import CLOCK, Clocks

P = ParamSpec("P")

# Time that one turn of the loop takes. If time stood still, a wait for the rest of a rounding error would never end.
_TURN_S = 1e-6


class _JumpingSelector(selectors.DefaultSelector):
    """Advances the time where a loop would sleep."""

    now_s = 0.0
    turns_to_look = -1

    def now(self) -> float:
        return self.now_s

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task waits, and nothing will ever wake one")
        elapsed_s = max(timeout, _TURN_S)
        self.now_s += elapsed_s
        if CLOCK._last is not None:
            # The thread that watches the process has run meanwhile, and notices a freeze one turn after the thaw.
            CLOCK._last = replace(CLOCK._last, monotonic_s=CLOCK._last.monotonic_s + elapsed_s)
            if self.turns_to_look == 0:
                CLOCK.look()
            self.turns_to_look -= 1
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


@contextmanager
def watched_for_freezes(loop: asyncio.AbstractEventLoop, on_thaw: Callable[[float], object]) -> Iterator[None]:
    """Let the worker's clock notice `freeze` on this loop, as `RunClock.watched` does with a thread."""

    def call_back(frozen_s: float) -> None:
        loop.call_soon(on_thaw, frozen_s)

    with mock.patch.object(CLOCK, "_last", Clocks()), mock.patch.object(CLOCK, "_on_thaw", call_back):
        yield


def freeze(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Let time pass while nothing runs. All timers that come due meanwhile fire in the next turn of the loop."""
    selector: _JumpingSelector = vars(loop)["_selector"]
    selector.now_s += seconds
    selector.turns_to_look = 1
