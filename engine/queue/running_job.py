"""A job that runs in this worker, and how far it has come."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum
from typing import Any

from engine.errors import JobError
from engine.queue.protocol import Delivery
from engine.run_clock import Timer
from engine.telemetry.job_times import JobTimes


class JobState(Enum):
    """How far a job has come."""

    RUNNING = "running"
    """Its outputs are delivered as they come. Only now can it be aborted."""
    FINISHING = "finishing"
    """Its result is decided."""
    DELIVERING = "delivering"
    """Its result is being delivered."""
    STOPPED = "stopped"
    """The platform has stopped it: it gets no result."""
    ABANDONED = "abandoned"
    """The worker ends before its result could be delivered."""


@dataclass(eq=False)
class RunningJob:
    """A job, its task, and what is known of its end.

    Attributes:
        id: the platform's.
        delivery: of its outputs.
        times: its times.
        asked_at: when the take that brought it was sent. Its answer may be older than the last freeze.
        has_run: whether its task has run. A task that is cancelled before would never run, nor remove the job.
        abort_error: the error that it ends with, if it was aborted.
        redelivered_job: the same job, taken again while this run was ending, and when that take was sent. It runs when
            this run is over.
    """

    id: str
    delivery: Delivery
    times: JobTimes
    asked_at: float
    state: JobState = JobState.RUNNING
    has_run: bool = False
    task: asyncio.Task[None] | None = None
    timer: Timer | None = None
    abort_error: JobError | None = None
    redelivered_job: tuple[dict[str, Any], float] | None = None

    def abort(self, state: JobState, error: JobError | None = None) -> None:
        """Cancel its task and move on to `state`."""
        self.state, self.abort_error = state, error
        if self.task is not None and self.has_run:
            self.task.cancel()
