"""The scaling decision: how many workers to start and which to stop, from counts and times only.

Source: docs.runpod.io, "Endpoint settings": QUEUE_DELAY adds a worker when a request has waited `scalerValue` seconds;
REQUEST_COUNT wants `ceil((requestsInQueue + requestsInProgress) / scalerValue)` workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from emulator.core.job_queue import QueueLoad
from emulator.core.worker import ACTIVE_STATES, FleetWorker, WorkerState
from emulator.settings import EndpointSettings


@dataclass(frozen=True)
class ScalingDecision:
    """What to do now.

    Args:
        start: how many workers to start.
        stop: ids of workers to stop.
        start_timed_out: ids of workers that were not ready in time.
    """

    start: int = 0
    stop: tuple[str, ...] = ()
    start_timed_out: tuple[str, ...] = ()


def decide(
    settings: EndpointSettings, load: QueueLoad, workers: Sequence[FleetWorker], now_s: float
) -> ScalingDecision:
    """Decide by the endpoint's settings.

    A worker that is stopping or unhealthy still has its process, and so counts towards `workersMax`.
    """
    timed_out = tuple(
        worker.id
        for worker in workers
        if worker.state is WorkerState.INITIALIZING and now_s - worker.state_since >= settings.start_timeout_s
    )
    active = [worker for worker in workers if worker.state in ACTIVE_STATES and worker.id not in timed_out]
    exiting = len(workers) - len(active)
    wanted = min(max(_wanted(settings, load, active, now_s), settings.workers_min), settings.workers_max)
    start = max(0, min(wanted - len(active), settings.workers_max - len(active) - exiting))

    floor = wanted if settings.scaler_type == "REQUEST_COUNT" else settings.workers_min
    idle = sorted(
        (
            worker
            for worker in active
            if worker.state is WorkerState.IDLE and now_s - worker.state_since >= settings.idle_timeout_s
        ),
        key=lambda worker: worker.state_since,
    )
    return ScalingDecision(start, tuple(worker.id for worker in idle[: max(0, len(active) - floor)]), timed_out)


def _wanted(settings: EndpointSettings, load: QueueLoad, active: Sequence[FleetWorker], now_s: float) -> int:
    """Return how many workers the load asks for, before the minimum and the maximum."""
    if settings.scaler_type == "REQUEST_COUNT":
        return math.ceil((load.waiting + load.running) / settings.scaler_value)
    last_start_s = max((worker.started_at for worker in active), default=-math.inf)
    delayed = load.waiting > 0 and load.longest_wait_s >= settings.scaler_value
    # The worker that was started last gets the same time to shorten the queue before another is added.
    return len(active) + (1 if delayed and now_s - last_start_s >= settings.scaler_value else 0)
