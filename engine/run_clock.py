"""Time in which this process ran. While it was frozen, this clock stood still, and so no deadline by it has passed.

RunPod's FlashBoot freezes a worker and thaws it seconds or hours later; a virtual machine or a laptop can be suspended.
By `time.monotonic()`, any timeout may then be over before the process could do anything about it. `RunClock.now` looks
for such a gap whenever it is read, so it does not matter what runs first after a thaw.

While the process is watched, a thread looks at the clocks twice a second. A gap in which the process used hardly any
processor time is one in which it did not run: a thread goes on while the event loop is blocked, and where a computation
holds the GIL, it uses the processor. A process that a busy machine left no processor for did not run either. Where a
whole machine was suspended or restored, the monotonic clock may have stood still too. Then nothing has to be added to
a deadline, but the wall clock or CLOCK_BOOTTIME shows the gap. (So does a wall clock that is set forward.)
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

FREEZE_S = 2.0
"""A shorter gap does not count as a freeze: no deadline is so close."""
_LOOK_INTERVAL_S = 0.5
# Of a gap in which the process may have run: with a full processor it has used all of it.
_MAX_BUSY_SHARE = 0.5
# How much too early a timer of the event loop may fire.
_TIMER_RESOLUTION_S = 0.005


def _monotonic_s() -> float:
    return time.monotonic()


def _boot_time_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Clocks:
    """All clocks, read at once, in seconds. On a system without CLOCK_BOOTTIME it is the monotonic clock.

    Attributes:
        monotonic_s: the clock of the event loop.
        wall_s: goes on whatever happens, and may be set.
        boot_s: as the monotonic clock, but goes on while the machine is suspended.
        busy_s: processor time of this process.
    """

    monotonic_s: float = field(default_factory=_monotonic_s)
    wall_s: float = field(default_factory=time.time)
    boot_s: float = field(default_factory=_boot_time_s if hasattr(time, "CLOCK_BOOTTIME") else _monotonic_s)
    busy_s: float = field(default_factory=time.process_time)


class RunClock:
    """A monotonic clock that stands still while the process is frozen, if it is watched.

    Args:
        read: reads all clocks.
    """

    def __init__(self, read: Callable[[], Clocks] = Clocks) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._last: Clocks | None = None
        self._skipped_s = 0.0
        self._on_thaw: Callable[[float], object] = lambda _: None

    def now(self) -> float:
        """Return the time in seconds. Until the first freeze, it is that of `time.monotonic()`."""
        # A freeze within the block delays other readers: they cannot see the gap before this one has returned.
        with self._lock:
            if self._last is None:
                return time.monotonic() - self._skipped_s
            now_s = time.monotonic()
            if not 0 <= now_s - self._last.monotonic_s < FREEZE_S:
                now_s = self._look()
            return now_s - self._skipped_s

    def look(self) -> None:
        """Look for a freeze since the last look, also for one that only the wall clock shows."""
        with self._lock:
            self._look()

    def _look(self) -> float:
        last, self._last = self._last, self._read()
        if last is None:
            return self._last.monotonic_s
        gap_s = self._last.monotonic_s - last.monotonic_s
        busy_s = self._last.busy_s - last.busy_s
        frozen_s = 0.0
        # A process that is restored on another machine may find an earlier time.
        if gap_s < 0 or (gap_s >= FREEZE_S and busy_s < _MAX_BUSY_SHARE * gap_s):
            self._skipped_s += gap_s
            frozen_s = max(gap_s, 0.0)
        unseen_s = max(self._last.wall_s - last.wall_s, self._last.boot_s - last.boot_s) - gap_s
        if unseen_s >= FREEZE_S:
            frozen_s += unseen_s
        if frozen_s or gap_s < 0:
            self._on_thaw(frozen_s)
        return self._last.monotonic_s

    @contextmanager
    def watched(self, on_thaw: Callable[[float], object]) -> Iterator[None]:
        """Notice freezes during the block.

        Args:
            on_thaw: called on the running event loop after each freeze, with its length in seconds.
        """
        loop = asyncio.get_running_loop()
        stopped = threading.Event()

        def watch() -> None:
            while not stopped.wait(_LOOK_INTERVAL_S):
                self.look()

        with self._lock:
            self._last = self._read()
            self._on_thaw = lambda frozen_s: loop.call_soon_threadsafe(on_thaw, frozen_s)
        thread = threading.Thread(target=watch, name="watch for freezes", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            with self._lock:
                self._last, self._on_thaw = None, lambda _: None

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Call back on the running event loop when the process has run for this long from now."""
        return Timer(self, delay_s, callback)

    async def wait(self, tasks: Iterable[asyncio.Future[Any]], timeout_s: float) -> None:
        """Wait until all tasks are done, or the process has run for `timeout_s` from now."""
        deadline = self.now() + timeout_s
        while (pending := [task for task in tasks if not task.done()]) and (left_s := deadline - self.now()) > 0:
            await asyncio.wait(pending, timeout=left_s)

    def sleep(self, duration_s: float) -> None:
        """Block the calling thread until the process has run for this long."""
        until = self.now() + duration_s
        while (left_s := until - self.now()) > 0:
            time.sleep(left_s)


class Timer:
    """A callback that comes due by a `RunClock`."""

    def __init__(self, clock: RunClock, delay_s: float, callback: Callable[[], object]) -> None:
        self._clock = clock
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._due_at = clock.now() + delay_s
        self._handle = self._loop.call_later(delay_s, self._on_timer)

    def cancel(self) -> None:
        """Do not call back."""
        self._handle.cancel()

    def _on_timer(self) -> None:
        left_s = self._due_at - self._clock.now()
        if left_s > _TIMER_RESOLUTION_S:
            self._handle = self._loop.call_later(left_s, self._on_timer)
        else:
            self._callback()


CLOCK = RunClock()
"""The worker's."""
