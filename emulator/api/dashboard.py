"""What the page shows: `GET /state`, one document, and `GET /state/events`, the same whenever it changes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from emulator.api.auth import JSONResponse, platform_of
from emulator.core.endpoint import Endpoint
from emulator.core.fleet import Worker
from emulator.core.job import Job

RECENT_JOBS = 200
# At most five documents a second.
_INTERVAL_S = 0.2


def snapshot(endpoints: Mapping[str, Endpoint], history_since: float = 0.0) -> dict[str, Any]:
    """The state of all endpoints, without a secret, a job's input or its output.

    Args:
        endpoints: by their ids.
        history_since: leave out of `history` what is not newer (seconds since 1970).
    """
    now, wall = time.monotonic(), time.time()
    # Times within are the clock's; those that are shown are the time of day.
    offset = wall - now
    return {
        "at": round(wall, 3),
        "endpoints": [_endpoint(endpoint, offset, history_since) for endpoint in endpoints.values()],
    }


def _endpoint(endpoint: Endpoint, offset: float, history_since: float) -> dict[str, Any]:
    settings = endpoint.settings
    return {
        "id": settings.id,
        "openaiPath": f"/v2/{settings.id}/openai/v1",
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
        "gone": [_worker(endpoint, worker, offset) for worker in endpoint.fleet.gone()],
        "jobs": [_job(job, offset) for job in endpoint.queue.recent(RECENT_JOBS)],
        "events": list(endpoint.events),
    }


def _worker(endpoint: Endpoint, worker: Worker, offset: float) -> dict[str, Any]:
    return {
        "id": worker.id,
        "state": worker.state,
        "reason": worker.reason,
        "pid": worker.process.pid if worker.process is not None else None,
        "startedAt": _shown(worker.started_at, offset),
        "readyAt": _shown(worker.ready_at, offset),
        "since": _shown(worker.since, offset),
        "endedAt": _shown(worker.ended_at, offset),
        "exitCode": worker.exit_code,
        "jobsTaken": worker.jobs,
        "jobs": [job.id for job in endpoint.queue.held(worker.id)],
        "log": list(worker.log),
    }


def _job(job: Job, offset: float) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": job.label,
        "status": job.status,
        "workerId": job.worker,
        "submittedAt": _shown(job.submitted_at, offset),
        "takenAt": _shown(job.taken_at, offset),
        "firstOutputAt": _shown(job.first_output_at, offset),
        "endedAt": _shown(job.ended_at, offset),
        "delayTime": job.delay_ms,
        "executionTime": job.execution_ms,
        "outputs": len(job.outputs),
        "retries": job.retries,
        "lowPriority": job.low_priority,
    }


def _shown(at: float | None, offset: float) -> float | None:
    return None if at is None else round(at + offset, 3)


async def show(request: Request) -> Response:
    """GET /state."""
    return JSONResponse(snapshot(platform_of(request).endpoints))


async def events(request: Request) -> Response:
    """GET /state/events: the first with all of the history, each further one with what is new of it."""
    return StreamingResponse(
        _events(platform_of(request).endpoints), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _events(endpoints: Mapping[str, Endpoint]) -> AsyncIterator[str]:
    seen, history_since = -1, 0.0
    while not all(endpoint.fleet.over for endpoint in endpoints.values()):
        changes = sum(endpoint.changes for endpoint in endpoints.values())
        if changes != seen:
            seen = changes
            document = snapshot(endpoints, history_since)
            history_since = max(
                (point["at"] for it in document["endpoints"] for point in it["history"][-1:]), default=history_since
            )
            yield f"data: {json.dumps(document)}\n\n"
        await asyncio.sleep(_INTERVAL_S)


routes = [Route("/state", show), Route("/state/events", events)]
