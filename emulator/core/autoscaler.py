"""The scaling decision: how many workers to start and which to stop, from counts and times only.

Source: docs.runpod.io, "Endpoint settings": QUEUE_DELAY adds a worker when a request has waited `scalerValue` seconds;
REQUEST_COUNT wants `ceil((requestsInQueue + requestsInProgress) / scalerValue)` workers. Spirit's console offers the
waiting time, too, and the queue's length: QUEUE_LENGTH adds a worker for every `scalerValue` tasks that wait, less the
workers that are starting.

`scale` has the rules, for counts of workers. `decide` counts the workers of a fleet; the simulation of `bench advise`,
which may have thousands, keeps its counts up to date instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final, Protocol

from emulator.core.work import QueueLoad
from emulator.core.worker import ACTIVE_STATES, FleetWorker, WorkerState
from emulator.settings import FleetSettings

TICK_INTERVAL_S: Final = 0.1
"""Time between two decisions, in seconds."""


class ScalingSettings(Protocol):
    """The settings that the rules read, named as the platform's."""

    @property
    def workers_min(self) -> int:
        """Minimum number of workers."""

    @property
    def workers_max(self) -> int:
        """Maximum number of workers."""

    @property
    def scaler_type(self) -> str:
        """QUEUE_DELAY, REQUEST_COUNT or QUEUE_LENGTH."""

    @property
    def scaler_value(self) -> float:
        """Seconds, jobs per worker, or waiting jobs."""

    @property
    def idle_timeout_s(self) -> float:
        """Seconds without a job until a worker is stopped."""


@dataclass
class WorkerCounts:
    """The workers as the rules see them. Times are in seconds.

    Args:
        total: all that have their place, whatever their state.
        usable: those that serve jobs, or will.
        starting: those of `usable` that are not ready yet.
        last_start_s: when the last of those that are not ending was started.
        idle: since when each worker without a job has had none, longest first.
        throttled: since when each worker has waited for its machine, longest first.
    """

    total: int = 0
    usable: int = 0
    starting: int = 0
    last_start_s: float = -math.inf
    idle: Mapping[str, float] = field(default_factory=dict)
    throttled: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ScalingDecision:
    """What to do now.

    Args:
        start: how many workers to start.
        stop: ids of workers to stop.
        init_timed_out: ids of workers that were not ready in time.
    """

    start: int = 0
    stop: tuple[str, ...] = ()
    init_timed_out: tuple[str, ...] = ()


def decide(settings: FleetSettings, load: QueueLoad, workers: Sequence[FleetWorker], now_s: float) -> ScalingDecision:
    """Decide by the endpoint's settings.

    Only workers that serve jobs, or will, count for the load and for `workersMin`. All count towards `workersMax`: one
    that is stopping, stale or unhealthy still has its process, and a throttled one has its place.
    """
    timed_out = tuple(
        worker.id
        for worker in workers
        if worker.state is WorkerState.INITIALIZING and now_s - worker.state_since >= settings.effective_init_timeout_s
    )
    active = [
        worker
        for worker in workers
        if worker.state in ACTIVE_STATES and not worker.is_stale and worker.id not in timed_out
    ]
    states = [worker.state for worker in active]
    counts = WorkerCounts(
        total=len(workers),
        usable=len(active) - states.count(WorkerState.THROTTLED),
        starting=states.count(WorkerState.INITIALIZING),
        last_start_s=max((worker.started_at for worker in active), default=-math.inf),
        idle=_longest_first(active, WorkerState.IDLE),
        throttled=_longest_first(active, WorkerState.THROTTLED),
    )
    start, stop = scale(settings, load, counts, now_s)
    return ScalingDecision(start, stop, timed_out)


def scale(
    settings: ScalingSettings, load: QueueLoad, workers: WorkerCounts, now_s: float
) -> tuple[int, tuple[str, ...]]:
    """Return how many workers to start, and the ids of those to stop."""
    # The worker that was started last gets the same time to shorten the queue before another is added.
    wanted = _wanted(settings, load, workers.usable, workers.starting, now_s - workers.last_start_s)
    wanted = min(max(wanted, settings.workers_min), settings.workers_max)
    start = max(0, min(wanted - workers.usable, settings.workers_max - workers.total))

    floor = wanted if settings.scaler_type == "REQUEST_COUNT" else settings.workers_min
    stop: list[str] = []
    if workers.usable > floor:
        stop += _expired(workers.idle, settings.idle_timeout_s, now_s)[: workers.usable - floor]
    if wanted <= workers.usable and not load.waiting:
        stop += _expired(workers.throttled, settings.idle_timeout_s, now_s)
    return start, tuple(stop)


def next_change_s(settings: ScalingSettings, load: QueueLoad, workers: WorkerCounts, now_s: float) -> float:
    """Return when `scale` may answer otherwise although nothing happens until then; infinity if it will not.

    A time that `now_s` equals counts as still to come: at that very moment rounding decides.
    """
    waiting = (workers.idle, workers.throttled)
    times = [next(iter(since_s.values())) + settings.idle_timeout_s for since_s in waiting if since_s]
    if settings.scaler_type == "QUEUE_DELAY" and load.waiting:
        times.append(max(now_s - load.longest_wait_s, workers.last_start_s) + settings.scaler_value)
    return min((time_s for time_s in times if time_s > now_s - TICK_INTERVAL_S), default=math.inf)


def _longest_first(workers: Sequence[FleetWorker], state: WorkerState) -> dict[str, float]:
    since_s = [(worker.state_since, worker.id) for worker in workers if worker.state is state]
    return {worker: since for since, worker in sorted(since_s, key=lambda item: item[0])}


def _expired(since_s: Mapping[str, float], timeout_s: float, now_s: float) -> list[str]:
    return [worker for worker, _ in takewhile(lambda item: now_s - item[1] >= timeout_s, since_s.items())]


def _wanted(settings: ScalingSettings, load: QueueLoad, usable: int, starting: int, since_start_s: float) -> int:
    """Return how many workers the load asks for, before the minimum and the maximum."""
    if settings.scaler_type == "REQUEST_COUNT":
        return math.ceil((load.waiting + load.running) / settings.scaler_value)
    if settings.scaler_type == "QUEUE_LENGTH":
        return usable + max(0, int(load.waiting / settings.scaler_value) - starting)
    delayed = load.waiting > 0 and load.longest_wait_s >= settings.scaler_value
    return usable + (1 if delayed and since_start_s >= settings.scaler_value else 0)
