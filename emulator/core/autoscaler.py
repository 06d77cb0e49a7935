"""The scaling decision: how many workers to start and which to stop, from counts and time alone.

Source: docs.runpod.io, "Endpoint settings": QUEUE_DELAY adds a worker when a request has waited `scalerValue` seconds;
REQUEST_COUNT wants `ceil((requestsInQueue + requestsInProgress) / scalerValue)` workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from emulator.core.job_queue import Load
from emulator.settings import EndpointSettings


class WorkerState(StrEnum):
    """A worker's state, in the platform's words; `stopping` is ours: told to end, and not ended yet."""

    INITIALIZING = "initializing"
    IDLE = "idle"
    RUNNING = "running"
    THROTTLED = "throttled"
    UNHEALTHY = "unhealthy"
    STOPPING = "stopping"


ACTIVE = frozenset({WorkerState.INITIALIZING, WorkerState.IDLE, WorkerState.RUNNING, WorkerState.THROTTLED})
"""Workers that serve, or will."""


@dataclass(frozen=True)
class Member:
    """One worker, as the decision sees it: its state, since when, and when it was started (seconds)."""

    id: str
    state: WorkerState
    since_s: float
    started_s: float


@dataclass(frozen=True)
class Decision:
    """What to do now: start so many workers, stop these, and give these up that have not come up in time."""

    start: int = 0
    stop: tuple[str, ...] = ()
    overdue: tuple[str, ...] = ()


def decide(settings: EndpointSettings, load: Load, members: Sequence[Member], now_s: float) -> Decision:
    """Decide by the endpoint's rules.

    A worker that is stopping or given up still has its process, and so its place under `workersMax`.
    """
    overdue = tuple(
        member.id
        for member in members
        if member.state is WorkerState.INITIALIZING and now_s - member.since_s >= settings.start_limit_s
    )
    active = [member for member in members if member.state in ACTIVE and member.id not in overdue]
    leaving = len(members) - len(active)
    wanted = min(max(_wanted(settings, load, active, now_s), settings.workers_min), settings.workers_max)
    start = max(0, min(wanted - len(active), settings.workers_max - len(active) - leaving))

    floor = wanted if settings.scaler_type == "REQUEST_COUNT" else settings.workers_min
    idle = sorted(
        (member for member in active if member.state is WorkerState.IDLE and _idle_out(settings, member, now_s)),
        key=lambda member: member.since_s,
    )
    return Decision(start, tuple(member.id for member in idle[: max(0, len(active) - floor)]), overdue)


def _wanted(settings: EndpointSettings, load: Load, active: Sequence[Member], now_s: float) -> int:
    if settings.scaler_type == "REQUEST_COUNT":
        return math.ceil((load.waiting + load.running) / settings.scaler_value)
    last_start_s = max((member.started_s for member in active), default=-math.inf)
    late = load.waiting > 0 and load.longest_wait_s >= settings.scaler_value
    # The one that was just added gets as long to make a difference before another is.
    return len(active) + (1 if late and now_s - last_start_s >= settings.scaler_value else 0)


def _idle_out(settings: EndpointSettings, member: Member, now_s: float) -> bool:
    return now_s - member.since_s >= settings.idle_timeout_s
