"""One worker of an endpoint, as its fleet keeps it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from emulator.core.process import Process

LOG_LINES: Final = 50


class WorkerState(StrEnum):
    """A worker's state, as the platform names it; two are ours.

    `stopping`: asked to stop, but still running. `frozen`: its processes are stopped by SIGSTOP, as FlashBoot would.
    """

    INITIALIZING = "initializing"
    IDLE = "idle"
    RUNNING = "running"
    THROTTLED = "throttled"
    UNHEALTHY = "unhealthy"
    STOPPING = "stopping"
    FROZEN = "frozen"


ACTIVE_STATES: Final = frozenset(
    {WorkerState.INITIALIZING, WorkerState.IDLE, WorkerState.RUNNING, WorkerState.THROTTLED}
)
"""States of workers that serve jobs, or will."""
TAKING_STATES: Final = frozenset({WorkerState.IDLE, WorkerState.RUNNING})
"""States of workers that are given jobs."""


@dataclass(eq=False)
class FleetWorker:
    """One worker, managed or external. All times are the fleet's clock, in seconds.

    Args:
        state_since: when the worker entered its state.
        last_seen_at: when it last sent a request.
        process: its process if the emulator started it and it has not exited; None for an external worker.
        kill_at: when it is killed, while it is stopping; None once it was killed.
        ready_at: when it first asked for a job; None before.
        is_held: whether it was frozen on request, so that the autoscaler neither thaws nor ends it.
        restored_at: when it was last thawed; None once it has answered since.
        reason: why it is in its state, for people to read.
        jobs_taken: how many jobs it was given.
        version: version of the endpoint's configuration that it runs; None for an external worker.
        is_stale: whether that is no longer the endpoint's version: it is given no more jobs, and replaced.
        log: its last log lines, without secrets.
    """

    id: str
    state: WorkerState
    started_at: float
    state_since: float
    last_seen_at: float
    process: Process | None = None
    kill_at: float | None = None
    ready_at: float | None = None
    exited_at: float | None = None
    exit_code: int | None = None
    is_held: bool = False
    restored_at: float | None = None
    reason: str = ""
    jobs_taken: int = 0
    version: int | None = None
    is_stale: bool = False
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))

    @property
    def takes_jobs(self) -> bool:
        """Whether it is given jobs."""
        return self.state in TAKING_STATES and not self.is_stale
