"""The routes that workers call, as the SDK does (runpod 1.12.0: `rp_job`, `rp_http`, `rp_ping`)."""

from __future__ import annotations

import hmac
import json
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from emulator.api.auth import context_of, endpoint_of_worker, key_of
from emulator.api.bodies import JSONResponse, describe_validation_error, parse_json, read_body
from emulator.core.faults import FaultKind, FaultRule
from emulator.core.job import MAX_CHUNK_BYTES, MAX_RESULT_BYTES, Job, JobStatus
from emulator.core.job_queue import JOBS_QUEUED_TOPIC, job_stop_topic
from emulator.core.long_poll import client_disconnect, is_disconnected
from emulator.core.runpod_endpoint import RunPodEndpoint
from emulator.errors import BadRequestError, ContentTooLargeError, UnauthorizedError
from emulator.integers import parse_integer

# Long polls of a worker that was asked to stop: slow enough that it does not spin, short enough not to delay its exit.
_STOPPING_POLL_S = 0.2


class JobUpdate(BaseModel):
    """What a worker posts for a job: an output, the result, an error, or progress (`status` is IN_PROGRESS)."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    output: Any = None
    error: Any = None
    status: str | None = None
    stopPod: bool = False  # noqa: N815 (the platform's name)


async def take(request: Request) -> Response:
    """GET job-take: one job, or 204 if none was queued during the long poll."""
    jobs = await _take(request, 1)
    return JSONResponse(jobs[0].worker_document()) if jobs else Response(status_code=HTTPStatus.NO_CONTENT)


async def take_batch(request: Request) -> Response:
    """GET job-take-batch: a list of up to `batch_size` jobs, or 204."""
    jobs = await _take(request, _batch_size(request))
    if not jobs:
        return Response(status_code=HTTPStatus.NO_CONTENT)
    return JSONResponse([job.worker_document() for job in jobs])


async def stop_signals(request: Request) -> Response:
    """GET job-stop: the jobs that the worker must stop, or 204 if there was none during the long poll."""
    endpoint, worker = _authenticate(request)
    endpoint.fleet.touch(worker)
    was_stopping = endpoint.fleet.is_stopping(worker)

    def poll() -> list[str] | None:
        if is_disconnected(request.state.transport):
            return []
        signals = endpoint.queue.pop_stop_signals(worker)
        # End a poll that was in progress when the worker was asked to stop.
        return signals if signals or (not was_stopping and endpoint.fleet.is_stopping(worker)) else None

    timeout_s = _poll_timeout_s(endpoint, worker)
    async with client_disconnect(request.receive) as disconnect:
        job_ids = await endpoint.long_poll.wait_for(job_stop_topic(worker), poll, timeout_s, disconnect)
    return JSONResponse({"jobsToStop": job_ids}) if job_ids else Response(status_code=HTTPStatus.NO_CONTENT)


async def stream(request: Request) -> Response:
    """POST job-stream: one output of a job that is assigned to the worker."""
    endpoint, worker = _authenticate(request)
    update = await _read_update(request, MAX_CHUNK_BYTES)
    endpoint.fleet.touch(worker)
    endpoint.queue.stream(worker, request.path_params["job"], update.output)
    endpoint.fleet.on_answer(worker)
    return JSONResponse({})


async def done(request: Request) -> Response:
    """POST job-done: the result, the error or the progress of a job that is assigned to the worker."""
    endpoint, worker = _authenticate(request)
    update = await _read_update(request, MAX_RESULT_BYTES)
    endpoint.fleet.touch(worker)
    job_id = request.path_params["job"]
    if update.status == JobStatus.IN_PROGRESS:
        endpoint.queue.progress(worker, job_id, update.output)
        return JSONResponse({})
    error = update.error if isinstance(update.error, str) else json.dumps(update.error)
    endpoint.queue.finish(worker, job_id, update.output, error if update.error else None)
    endpoint.fleet.on_answer(worker)
    if update.stopPod and endpoint.fleet.is_managed(worker):
        endpoint.fleet.stop(worker, "requested with its last job (stopPod)")
    return JSONResponse({})


async def ping(request: Request) -> Response:
    """GET ping: the worker runs the jobs of `job_id`; with `status=unhealthy`, it cannot serve."""
    endpoint, worker = _authenticate(request)
    endpoint.fleet.touch(worker)
    query = request.query_params
    if query.get("status") == "unhealthy":
        endpoint.fleet.on_unhealthy(worker, f"{query.get('check', 'fitness check')}: {query.get('reason', '')}")
    else:
        endpoint.queue.ping(worker, filter(None, query.get("job_id", "").split(",")))
    return JSONResponse({})


async def _take(request: Request, count: int) -> list[Job]:
    endpoint, worker_id = _authenticate(request)
    worker = endpoint.fleet.on_poll(worker_id)
    was_stopping = endpoint.fleet.is_stopping(worker_id)

    def poll() -> list[Job] | None:
        if not worker.takes_jobs:
            # End a poll that was in progress when the worker was asked to stop.
            return [] if not was_stopping and endpoint.fleet.is_stopping(worker_id) else None
        if is_disconnected(request.state.transport):
            # The response could not be sent, even if uvicorn has not reported the disconnect yet.
            return []
        if endpoint.duplicates:
            return endpoint.duplicates.pop()
        return endpoint.queue.take(worker_id, count) or None

    timeout_s = _poll_timeout_s(endpoint, worker_id)
    async with client_disconnect(request.receive) as disconnect:
        jobs = await endpoint.long_poll.wait_for(JOBS_QUEUED_TOPIC, poll, timeout_s, disconnect) or []
    worker.jobs_taken += len(jobs)
    faults: list[FaultRule] = request.state.faults
    if jobs and any(rule.kind is FaultKind.DUPLICATE for rule in faults):
        endpoint.duplicates.append(jobs)
        endpoint.long_poll.notify(JOBS_QUEUED_TOPIC)
    return jobs


def _poll_timeout_s(endpoint: RunPodEndpoint, worker: str) -> float:
    """Return the maximum duration of this worker's long poll."""
    return _STOPPING_POLL_S if endpoint.fleet.is_stopping(worker) else endpoint.settings.long_poll_s


def _authenticate(request: Request) -> tuple[RunPodEndpoint, str]:
    """Return the endpoint and the id of the worker that sent the request.

    A managed worker's id is enough, since the SDK prefers the key of the user's own credentials file, if there is one,
    to the key that the worker was given. The id is random but no secret: GET /state shows it without a key. So
    everyone who can send requests to the emulator can act as a managed worker.

    Raises:
        UnauthorizedError: an external worker without the endpoint's worker key or an API key.
    """
    endpoint = endpoint_of_worker(request)
    worker: str = request.path_params["worker"]
    key = key_of(request)
    is_valid = hmac.compare_digest(key.encode(), endpoint.worker_key.encode()) or context_of(request).is_api_key(key)
    if not is_valid and not endpoint.fleet.is_managed(worker):
        raise UnauthorizedError("the worker has no valid key in RUNPOD_AI_API_KEY")
    endpoint.connections.add(worker, request.state.transport)
    return endpoint, worker


async def _read_update(request: Request, max_bytes: int) -> JobUpdate:
    """Return the body, which the SDK sends as JSON with a form's content type.

    Raises:
        BadRequestError: it is invalid, or too large: the platform responds to a worker with 400, not with 413.
    """
    try:
        value = parse_json(await read_body(request, max_bytes), allow_nan=True)
        return JobUpdate.model_validate(value)
    except ContentTooLargeError as error:
        raise BadRequestError(str(error)) from None
    except ValidationError as error:
        raise BadRequestError(describe_validation_error(error)) from None


def _batch_size(request: Request) -> int:
    text = request.query_params.get("batch_size", "1")
    size = parse_integer(text)
    if not size:
        raise BadRequestError(f"batch_size={text[:50]!r}: expected an integer of at least 1")
    return size


_ROOT = "/v2/{endpoint}"

# Routes are matched in this order: the most frequent first.
routes = [
    Route(_ROOT + "/job-stream/{worker}/{job}", stream, methods=["POST"]),
    Route(_ROOT + "/job-done/{worker}/{job}", done, methods=["POST"]),
    Route(_ROOT + "/job-take-batch/{worker}", take_batch),
    Route(_ROOT + "/job-take/{worker}", take),
    Route(_ROOT + "/job-stop/{worker}", stop_signals),
    Route(_ROOT + "/ping/{worker}", ping),
]
