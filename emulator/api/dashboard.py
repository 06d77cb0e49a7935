"""The state that the page shows: `GET /state` returns it once, `GET /state/events` again after each change."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from emulator.api.auth import AppContext, context_of
from emulator.api.bodies import JSONResponse
from emulator.core.endpoint import Endpoint
from emulator.core.work import Work
from emulator.core.worker import FleetWorker

MAX_JOBS = 200
# At most five events a second.
_MIN_INTERVAL_S = 0.2


def snapshot(endpoints: Mapping[str, Endpoint], history_since: float = 0.0) -> dict[str, Any]:
    """Return the state of all endpoints, without secrets, job inputs or outputs.

    Args:
        endpoints: endpoints by id.
        history_since: `history` has only newer points (seconds since 1970).
    """
    now, wall = time.monotonic(), time.time()
    # Internal times are monotonic; shown times are seconds since 1970.
    offset = wall - now
    return {
        "at": round(wall, 3),
        "endpoints": [_endpoint(endpoint, offset, history_since) for endpoint in endpoints.values()],
    }


def _endpoint(endpoint: Endpoint, offset: float, history_since: float) -> dict[str, Any]:
    settings = endpoint.settings
    return {
        "id": settings.id,
        **endpoint.page_document(),
        "scaler": {
            "type": settings.scaler_type,
            "value": settings.scaler_value,
            "workersMin": settings.workers_min,
            "workersMax": settings.workers_max,
            "idleTimeout": settings.idle_timeout_s,
        },
        "health": {"jobs": endpoint.queue.health(), "workers": endpoint.fleet.health()},
        "history": [point for point in endpoint.history if point["at"] > history_since],
        "workers": [_worker(endpoint, worker, offset) for worker in endpoint.fleet.workers()],
        "gone": [_worker(endpoint, worker, offset) for worker in endpoint.fleet.exited_workers()],
        "jobs": [_job(job, offset) for job in endpoint.queue.recent(MAX_JOBS)],
        "events": list(endpoint.events),
    }


def _worker(endpoint: Endpoint, worker: FleetWorker, offset: float) -> dict[str, Any]:
    return {
        "id": worker.id,
        "state": worker.state,
        "reason": worker.reason,
        "pid": worker.process.pid if worker.process is not None else None,
        "startedAt": _wall_time(worker.started_at, offset),
        "readyAt": _wall_time(worker.ready_at, offset),
        "since": _wall_time(worker.state_since, offset),
        "endedAt": _wall_time(worker.exited_at, offset),
        "exitCode": worker.exit_code,
        "jobsTaken": worker.jobs_taken,
        "jobs": [job.id for job in endpoint.queue.running_jobs(worker.id)],
        "log": list(worker.log),
    }


def _job(job: Work, offset: float) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": job.kind,
        "status": job.status,
        "workerId": job.worker,
        "submittedAt": _wall_time(job.submitted_at, offset),
        "takenAt": _wall_time(job.taken_at, offset),
        "firstOutputAt": _wall_time(job.first_output_at, offset),
        "endedAt": _wall_time(job.ended_at, offset),
        "delayTime": job.delay_ms,
        "executionTime": job.execution_ms,
        "outputs": job.output_count,
        "retries": job.retries,
        **job.platform_document(),
    }


def _wall_time(at: float | None, offset: float) -> float | None:
    return None if at is None else round(at + offset, 3)


async def get_state(request: Request) -> Response:
    """GET /state."""
    return JSONResponse(snapshot(context_of(request).endpoints))


async def stream_state(request: Request) -> Response:
    """GET /state/events: the first event has the complete history, each later one only its new points."""
    return StreamingResponse(
        _events(context_of(request)), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _events(context: AppContext) -> AsyncIterator[str]:
    endpoints = context.endpoints
    sent_changes, history_since = {"": -1}, 0.0
    while not context.finished.is_set():
        changes = {name: endpoint.changes for name, endpoint in endpoints.items()}
        # The page takes a stream without an event for dead; an endpoint's samples are changes.
        changes[""] = 0 if endpoints else int(time.monotonic())
        if changes != sent_changes:
            sent_changes = changes
            document = snapshot(endpoints, history_since)
            history_since = max(
                (point["at"] for endpoint in document["endpoints"] for point in endpoint["history"][-1:]),
                default=history_since,
            )
            yield f"data: {json.dumps(document)}\n\n"
        await asyncio.sleep(_MIN_INTERVAL_S)


routes = [Route("/state", get_state), Route("/state/events", stream_state)]
