"""The scaling decision: how many workers to start and which to stop, from counts and times only.

Source: docs.runpod.io, "Endpoint settings": QUEUE_DELAY adds a worker when a request has waited `scalerValue` seconds;
REQUEST_COUNT wants `ceil((requestsInQueue + requestsInProgress) / scalerValue)` workers. Spirit's console offers the
waiting time, too, and the queue's length: QUEUE_LENGTH adds a worker for every `scalerValue` tasks that wait, less the
workers that are starting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from emulator.core.work import QueueLoad
from emulator.core.worker import ACTIVE_STATES, FleetWorker, WorkerState
from emulator.settings import FleetSettings


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
    usable = [worker for worker in active if worker.state is not WorkerState.THROTTLED]
    # The worker that was started last gets the same time to shorten the queue before another is added.
    last_start_s = max((worker.started_at for worker in active), default=-math.inf)
    starting = sum(worker.state is WorkerState.INITIALIZING for worker in usable)
    wanted = _wanted(settings, load, len(usable), starting, now_s - last_start_s)
    wanted = min(max(wanted, settings.workers_min), settings.workers_max)
    start = max(0, min(wanted - len(usable), settings.workers_max - len(workers)))

    expired = sorted(
        (worker for worker in active if now_s - worker.state_since >= settings.idle_timeout_s),
        key=lambda worker: worker.state_since,
    )
    floor = wanted if settings.scaler_type == "REQUEST_COUNT" else settings.workers_min
    idle = [worker.id for worker in expired if worker.state is WorkerState.IDLE]
    stop = idle[: max(0, len(usable) - floor)]
    if wanted <= len(usable) and not load.waiting:
        stop += [worker.id for worker in expired if worker.state is WorkerState.THROTTLED]
    return ScalingDecision(start, tuple(stop), timed_out)


def _wanted(settings: FleetSettings, load: QueueLoad, usable: int, starting: int, since_start_s: float) -> int:
    """Return how many workers the load asks for, before the minimum and the maximum."""
    if settings.scaler_type == "REQUEST_COUNT":
        return math.ceil((load.waiting + load.running) / settings.scaler_value)
    if settings.scaler_type == "QUEUE_LENGTH":
        return usable + max(0, int(load.waiting / settings.scaler_value) - starting)
    delayed = load.waiting > 0 and load.longest_wait_s >= settings.scaler_value
    return usable + (1 if delayed and since_start_s >= settings.scaler_value else 0)
