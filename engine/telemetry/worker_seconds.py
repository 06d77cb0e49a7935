"""Shares the worker's seconds, which the platform bills, among the jobs: all of them add up to the worker's age.

While jobs run, each gets an equal part of each second. While none runs, the worker is idle. The seconds of the start
belong to the jobs that it was for: those that were taken as soon as the worker could take any. If there were none, as
on a worker that is kept ready, they are nobody's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from engine.run_clock import CLOCK

# A job that came this soon after the worker was ready had waited for it.
START_GRACE_S = 1.0


@dataclass(slots=True, eq=False)
class Share:
    """One job's share of the worker's seconds.

    Attributes:
        worker_s: of the time in which it ran.
        start_s: of the worker's start.
        level_before: `WorkerSeconds`' level when it began.
        waits_for_start: whether it has yet to get its part of the start.
    """

    worker_s: float = 0.0
    start_s: float = 0.0
    level_before: float = 0.0
    waits_for_start: bool = False


@dataclass(frozen=True, slots=True)
class Totals:
    """What the worker's seconds were for. The sum of `start_s`, `idle_s` and `jobs_s` is `worker_s`.

    Attributes:
        worker_s: its age.
        start_s: its start, as far as it is no job's.
        idle_s: no job ran.
        jobs_s: all shares, of jobs that have ended and of those that run.
    """

    worker_s: float
    start_s: float
    idle_s: float
    jobs_s: float


class WorkerSeconds:
    """Counts the seconds of one worker.

    Args:
        started_at: when it was started, by `now`.
        now: a clock, in seconds, which stands still while the worker is frozen and not billed.
    """

    def __init__(self, started_at: float, now: Callable[[], float] = CLOCK.now) -> None:
        self._now = now
        self._lock = threading.Lock()  # A thread reads the totals.
        self._started_at = started_at
        self._ready_at: float | None = None
        self._last = started_at
        self._running = 0
        # What one job has got that has run all the time: the integral of one second for each running job.
        self._level = 0.0
        self._idle_s = self._jobs_s = 0.0
        self._start_left_s = 0.0
        self._waiting_for_start = 0

    @property
    def has_served(self) -> bool:
        """Whether the start has ended. It does not for a single job off the platform, which is not counted."""
        return self._ready_at is not None

    def ready(self) -> None:
        """End the start: the worker takes jobs from now on."""
        with self._lock:
            self._ready_at = self._last = self._now()
            self._start_left_s = self._ready_at - self._started_at

    def begin(self, share: Share) -> None:
        """Begin to count for a job."""
        with self._lock:
            self._advance()
            self._running += 1
            share.level_before = self._level
            if self._ready_at is not None and self._last - self._ready_at <= START_GRACE_S:
                share.waits_for_start = True
                self._waiting_for_start += 1

    def update(self, share: Share) -> None:
        """Set the share of a running job to what it is by now."""
        with self._lock:
            self._update(share)

    def _update(self, share: Share) -> None:
        self._advance()
        share.worker_s = self._level - share.level_before
        if share.waits_for_start:
            share.start_s = self._start_left_s / self._waiting_for_start

    def end(self, share: Share) -> None:
        """Set the share of a job that ends, for good."""
        with self._lock:
            self._update(share)
            self._running -= 1
            if share.waits_for_start:
                self._start_left_s -= share.start_s
                self._waiting_for_start -= 1
                self._jobs_s += share.start_s
                share.waits_for_start = False

    def totals(self) -> Totals:
        """Return what all seconds so far were for."""
        with self._lock:
            self._advance()
            start_s = (self._last - self._started_at) if self._ready_at is None else self._start_left_s
            taken_s = start_s if self._waiting_for_start else 0.0
            return Totals(self._last - self._started_at, start_s - taken_s, self._idle_s, self._jobs_s + taken_s)

    def _advance(self) -> None:
        now = self._now()
        elapsed_s, self._last = now - self._last, now
        if self._ready_at is None:
            return
        if self._running:
            self._level += elapsed_s / self._running
            self._jobs_s += elapsed_s
        else:
            self._idle_s += elapsed_s
