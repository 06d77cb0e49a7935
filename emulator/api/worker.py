"""The routes that workers call, as the SDK speaks them (runpod 1.12.0: `rp_job`, `rp_http`, `rp_ping`)."""

from __future__ import annotations

import hmac
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from emulator.api.auth import JSONResponse, endpoint_of, faults_in, key_of, parse_json, platform_of, read_body
from emulator.core.endpoint import Endpoint
from emulator.core.faults import FaultKind, Rule
from emulator.core.job import CHUNK_BYTES, RESULT_BYTES, Job, JobStatus
from emulator.core.job_queue import WAITING, stop_topic
from emulator.core.long_poll import hang_up_of, has_hung_up
from emulator.errors import InvalidRequestError, TooLargeError, UnauthorizedError

# A worker that is told to end and polls on all the same is slowed down, and held up no longer than that.
_LEAVING_POLL_S = 0.2


class Delivery(BaseModel):
    """What a worker posts: an output, the result, an error, or progress (`status` IN_PROGRESS)."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    output: Any = None
    error: Any = None
    status: str | None = None
    stopPod: bool = False  # noqa: N815 (the platform's name)


async def take(request: Request) -> Response:
    """GET job-take: one job, or 204 when none came while the poll was held."""
    jobs = await _take(request, 1)
    return JSONResponse(jobs[0].for_worker()) if jobs else Response(status_code=HTTPStatus.NO_CONTENT)


async def take_batch(request: Request) -> Response:
    """GET job-take-batch: a list of up to `batch_size` jobs, or 204."""
    jobs = await _take(request, _count(request.query_params.get("batch_size", "1")))
    if not jobs:
        return Response(status_code=HTTPStatus.NO_CONTENT)
    return JSONResponse([job.for_worker() for job in jobs])


async def stop_signals(request: Request) -> Response:
    """GET job-stop: the jobs that the worker is to stop, or 204 when there was none while the poll was held."""
    endpoint, worker = _caller(request)
    endpoint.fleet.called(worker)
    leaving = endpoint.fleet.leaving(worker)

    def look() -> list[str] | None:
        if has_hung_up(request.state.transport) or (not leaving and endpoint.fleet.leaving(worker)):
            return []
        return endpoint.queue.stop_signals(worker) or None

    async with hang_up_of(request.receive) as hang_up:
        job_ids = await endpoint.waiting.until(stop_topic(worker), look, _held_s(endpoint, worker), hang_up)
    return JSONResponse({"jobsToStop": job_ids}) if job_ids else Response(status_code=HTTPStatus.NO_CONTENT)


async def stream(request: Request) -> Response:
    """POST job-stream: one output of a job that the worker holds."""
    endpoint, worker = _caller(request)
    delivery = await _delivery(request, CHUNK_BYTES)
    endpoint.fleet.called(worker)
    endpoint.queue.stream(worker, request.path_params["job"], delivery.output)
    return JSONResponse({})


async def done(request: Request) -> Response:
    """POST job-done: the result or the error of a job that the worker holds, or its progress."""
    endpoint, worker = _caller(request)
    delivery = await _delivery(request, RESULT_BYTES)
    endpoint.fleet.called(worker)
    job_id = request.path_params["job"]
    if delivery.status == JobStatus.IN_PROGRESS:
        endpoint.queue.progress(worker, job_id, delivery.output)
        return JSONResponse({})
    error = str(delivery.error) if delivery.error else None
    endpoint.queue.finish(worker, job_id, delivery.output, error)
    if delivery.stopPod and endpoint.fleet.started_here(worker):
        endpoint.fleet.stop(worker, "asked for it with its last job (stopPod)")
    return JSONResponse({})


async def ping(request: Request) -> Response:
    """GET ping: the worker is there, and has the jobs of `job_id`; or, with `status=unhealthy`, cannot serve."""
    endpoint, worker = _caller(request)
    endpoint.fleet.called(worker)
    query = request.query_params
    if query.get("status") == "unhealthy":
        endpoint.fleet.unhealthy(worker, f"{query.get('check', 'fitness check')}: {query.get('reason', '')}")
    else:
        endpoint.queue.ping(worker, filter(None, query.get("job_id", "").split(",")))
    return JSONResponse({})


async def _take(request: Request, count: int) -> list[Job]:
    endpoint, worker_id = _caller(request)
    worker = endpoint.fleet.polled(worker_id)
    leaving = endpoint.fleet.leaving(worker_id)

    def look() -> list[Job] | None:
        if not endpoint.fleet.may_take(worker):
            # A poll that is under way when the worker is told to end keeps it no longer.
            return [] if not leaving and endpoint.fleet.leaving(worker_id) else None
        if has_hung_up(request.state.transport):
            # Nothing can be sent any more, though nobody has said so yet.
            return []
        if endpoint.duplicates:
            return endpoint.duplicates.pop()
        return endpoint.queue.take(worker_id, count) or None

    async with hang_up_of(request.receive) as hang_up:
        jobs = await endpoint.waiting.until(WAITING, look, _held_s(endpoint, worker_id), hang_up) or []
    worker.jobs += len(jobs)
    struck: list[Rule] = request.state.faults
    if jobs and any(rule.kind is FaultKind.DUPLICATE for rule in struck):
        endpoint.duplicates.append(jobs)
        endpoint.waiting.wake(WAITING)
    return jobs


def _held_s(endpoint: Endpoint, worker: str) -> float:
    """How long a poll of this worker is held."""
    return _LEAVING_POLL_S if endpoint.fleet.leaving(worker) else endpoint.settings.long_poll_s


def _caller(request: Request) -> tuple[Endpoint, str]:
    """The endpoint and the id of the worker that calls.

    A worker that we started is known by its id alone, which is random and told to nobody else: the SDK sends the key
    of its user's own credentials file where there is one, and not the one that it was given.

    Raises:
        UnauthorizedError: it is a worker of somebody else, without the endpoint's key or an API key.
    """
    endpoint = endpoint_of(request)
    worker: str = request.path_params["worker"]
    key = key_of(request)
    known = hmac.compare_digest(key.encode(), endpoint.worker_key.encode()) or platform_of(request).allows(key)
    if not known and not endpoint.fleet.started_here(worker):
        raise UnauthorizedError("the worker has no valid key in RUNPOD_AI_API_KEY")
    return endpoint, worker


async def _delivery(request: Request, limit_bytes: int) -> Delivery:
    """The body, which the SDK sends as JSON under the content type of a form.

    Raises:
        InvalidRequestError: it is not such a body, or too large: what a worker posts is refused with 400.
    """
    try:
        value = parse_json(await read_body(request, limit_bytes))
        return Delivery.model_validate(value)
    except TooLargeError as error:
        raise InvalidRequestError(str(error)) from None
    except ValidationError as error:
        raise InvalidRequestError(faults_in(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InvalidRequestError(f"batch_size is {text!r}, which is not a whole number above 0")
    return int(text)


_ROOT = "/v2/{endpoint}"

# Looked through in this order: those that are called most come first.
routes = [
    Route(_ROOT + "/job-stream/{worker}/{job}", stream, methods=["POST"]),
    Route(_ROOT + "/job-done/{worker}/{job}", done, methods=["POST"]),
    Route(_ROOT + "/job-take-batch/{worker}", take_batch),
    Route(_ROOT + "/job-take/{worker}", take),
    Route(_ROOT + "/job-stop/{worker}", stop_signals),
    Route(_ROOT + "/ping/{worker}", ping),
]
