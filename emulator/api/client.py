"""The routes that clients call: docs.runpod.io, "Operation reference"."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from emulator.api.auth import JSONResponse, authorize, endpoint_of, faults_in, parse_json, read_body
from emulator.core.endpoint import Endpoint
from emulator.core.job import (
    RUN_BODY_BYTES,
    RUN_RETENTION_S,
    RUNSYNC_BODY_BYTES,
    RUNSYNC_RETENTION_S,
    RUNSYNC_WAIT_MS,
    RUNSYNC_WAIT_RANGE_MS,
    Job,
    Submission,
)
from emulator.core.job_queue import job_topic
from emulator.core.long_poll import hang_up_of
from emulator.errors import InvalidRequestError

# How long /stream waits for an output before it answers without one; the official client asks once a second.
_STREAM_WAIT_S = 1.0

_Operation = Callable[[Request, Endpoint], Awaitable[Response]]


async def run(request: Request, endpoint: Endpoint) -> Response:
    """POST /run: queue a job and answer at once."""
    submission = await _submission(request, RUN_BODY_BYTES)
    job = endpoint.queue.submit(submission, retention_s=RUN_RETENTION_S)
    return JSONResponse({"id": job.id, "status": job.status})


async def runsync(request: Request, endpoint: Endpoint) -> Response:
    """POST /runsync?wait=ms: queue a job and answer when it has ended, or with its state when the wait is over."""
    wait_s = _milliseconds(request, "wait", RUNSYNC_WAIT_MS, RUNSYNC_WAIT_RANGE_MS) / 1000
    submission = await _submission(request, RUNSYNC_BODY_BYTES)
    job = endpoint.queue.submit(submission, prefix="sync-", label="runsync", retention_s=RUNSYNC_RETENTION_S)
    async with hang_up_of(request.receive) as hang_up:
        await endpoint.waiting.until(job_topic(job.id), lambda: job.status.final or None, wait_s, hang_up)
    return JSONResponse(job.document())


async def status(request: Request, endpoint: Endpoint) -> Response:
    """GET /status/{id}?ttl=ms: the job's state; with `ttl`, its result is kept only so long."""
    job = _job(request, endpoint)
    if "ttl" in request.query_params:
        endpoint.queue.keep_result(job, _milliseconds(request, "ttl", 0, (0, 7 * 24 * 3600 * 1000)) / 1000)
    return JSONResponse(job.document())


async def stream(request: Request, endpoint: Endpoint) -> Response:
    """GET /stream/{id}: the outputs since the last call, each given out once."""
    job = _job(request, endpoint)

    def look() -> bool | None:
        return job.status.final or len(job.outputs) > job.streamed or None

    async with hang_up_of(request.receive) as hang_up:
        await endpoint.waiting.until(job_topic(job.id), look, _STREAM_WAIT_S, hang_up)
        if hang_up.done():
            # Nobody would get them.
            return Response(status_code=HTTPStatus.NO_CONTENT)
        outputs = endpoint.queue.read_stream(job)
    return JSONResponse({"status": job.status, "stream": [{"output": output} for output in outputs]})


async def cancel(request: Request, endpoint: Endpoint) -> Response:
    """POST /cancel/{id}: end a job that waits or runs."""
    job = endpoint.queue.cancel(request.path_params["job"])
    return JSONResponse({"id": job.id, "status": job.status})


async def retry(request: Request, endpoint: Endpoint) -> Response:
    """POST /retry/{id}: queue a job anew that failed or timed out."""
    job = endpoint.queue.retry(request.path_params["job"])
    return JSONResponse({"id": job.id, "status": job.status})


async def purge_queue(_request: Request, endpoint: Endpoint) -> Response:
    """POST /purge-queue: cancel all jobs that wait."""
    return JSONResponse({"removed": endpoint.queue.purge(), "status": "completed"})


async def health(_request: Request, endpoint: Endpoint) -> Response:
    """GET /health: how many jobs and workers there are in each state."""
    return JSONResponse({"jobs": endpoint.queue.health(), "workers": endpoint.fleet.health()})


def _route(path: str, operation: _Operation, *methods: str) -> Route:
    """The operation, for clients with an API key and within its rate limit."""
    name = path.partition("/")[0]

    async def serve(request: Request) -> Response:
        authorize(request)
        endpoint = endpoint_of(request)
        if not endpoint.settings.rate_limits:
            return await operation(request, endpoint)
        with endpoint.limiter.admit(name):
            return await operation(request, endpoint)

    return Route("/v2/{endpoint}/" + path, serve, methods=list(methods))


async def _submission(request: Request, limit_bytes: int) -> Submission:
    value = parse_json(await read_body(request, limit_bytes))
    try:
        submission = Submission.model_validate(value)
    except ValidationError as error:
        raise InvalidRequestError(faults_in(error)) from None
    if submission.input is None:
        raise InvalidRequestError("input: it is null; give the parameters of your worker's handler")
    return submission


def _job(request: Request, endpoint: Endpoint) -> Job:
    return endpoint.queue.job(request.path_params["job"])


def _milliseconds(request: Request, name: str, default: int, limits: tuple[int, int]) -> int:
    """A number of milliseconds from the query, brought within its documented limits."""
    text = request.query_params.get(name, str(default))
    if not text.isdecimal():
        raise InvalidRequestError(f"{name} is {text!r}, which is not a whole number of milliseconds")
    return min(max(int(text), limits[0]), limits[1])


routes = [
    _route("run", run, "POST"),
    _route("runsync", runsync, "POST"),
    # The documentation has GET; older versions of it had both.
    _route("status/{job}", status, "GET", "POST"),
    _route("stream/{job}", stream, "GET", "POST"),
    _route("cancel/{job}", cancel, "POST"),
    _route("retry/{job}", retry, "POST"),
    _route("purge-queue", purge_queue, "POST"),
    _route("health", health, "GET"),
]
