"""Limits the requests that run at once to what the engine can start.

A queue keeps the jobs that a worker does not take. A balancer keeps nothing: what the engine cannot start now waits
here, for as long as its client would wait until another attempt at the least, and is then refused.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from engine.errors import EngineFullError
from engine.run_clock import CLOCK

# `Retry-After` is in whole seconds: a client that is refused at once would come back no earlier than this.
MAX_WAIT_S = 1.0


class Limiter:
    """Lets requests start in the order in which they came.

    Args:
        available_slots: returns how many more requests the engine can start while this many run.
        load_changed: is set when that may have changed; the limiter clears it.
        max_wait_s: how long a request may wait, in seconds by `engine.run_clock`.
    """

    def __init__(
        self, available_slots: Callable[[int], int], load_changed: asyncio.Event, max_wait_s: float = MAX_WAIT_S
    ) -> None:
        self._available_slots = available_slots
        self._load_changed = load_changed
        self._max_wait_s = max_wait_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.running = 0
        """Requests that have a slot."""

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold a slot of the engine in the block.

        Raises:
            EngineFullError: none became free in time.
        """
        await self._acquire()
        try:
            yield
        finally:
            self.running -= 1
            self._start_waiting()

    async def run(self) -> None:
        """Let waiting requests start as the engine's load changes, until it is cancelled."""
        while True:
            await self._load_changed.wait()
            self._load_changed.clear()
            self._start_waiting()

    async def _acquire(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._start_waiting()
        if turn.done():
            return
        try:
            await CLOCK.wait({turn}, self._max_wait_s)
        except asyncio.CancelledError:
            if turn.done():  # It came just now.
                self.running -= 1
                self._start_waiting()
            else:
                self._waiting.remove(turn)
            raise
        if not turn.done():
            self._waiting.remove(turn)
            raise EngineFullError("the worker's engine is full; try again")

    def _start_waiting(self) -> None:
        while self._waiting and self._available_slots(self.running) > 0:
            self.running += 1
            self._waiting.popleft().set_result(None)
