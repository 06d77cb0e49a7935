"""The routes that clients call: docs.runpod.io, "Operation reference"."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from emulator.api.auth import authorize, endpoint_of
from emulator.api.bodies import JSONResponse, describe_validation_error, parse_json, read_body
from emulator.core.job import (
    MAX_RUN_BODY_BYTES,
    MAX_RUNSYNC_BODY_BYTES,
    RUN_RETENTION_S,
    RUNSYNC_RETENTION_S,
    RUNSYNC_WAIT_MS,
    RUNSYNC_WAIT_RANGE_MS,
    Job,
    Submission,
)
from emulator.core.job_queue import job_topic
from emulator.core.long_poll import client_disconnect
from emulator.core.runpod_endpoint import RunPodEndpoint
from emulator.errors import BadRequestError
from emulator.integers import parse_integer

# How long /stream waits for an output before it responds without one; the official client polls once a second.
_STREAM_WAIT_S = 1.0
_RESULT_TTL_RANGE_MS = (0, 7 * 24 * 3600 * 1000)

_Operation = Callable[[Request, RunPodEndpoint], Awaitable[Response]]


async def run(request: Request, endpoint: RunPodEndpoint) -> Response:
    """POST /run: queue a job and respond at once."""
    submission = await _read_submission(request, MAX_RUN_BODY_BYTES)
    job = endpoint.queue.submit(submission, retention_s=RUN_RETENTION_S)
    return JSONResponse({"id": job.id, "status": job.status})


async def runsync(request: Request, endpoint: RunPodEndpoint) -> Response:
    """POST /runsync?wait=ms: queue a job and respond when it has ended, or with its state after the wait."""
    wait_s = _milliseconds(request, "wait", RUNSYNC_WAIT_MS, RUNSYNC_WAIT_RANGE_MS) / 1000
    submission = await _read_submission(request, MAX_RUNSYNC_BODY_BYTES)
    job = endpoint.queue.submit(submission, prefix="sync-", kind="runsync", retention_s=RUNSYNC_RETENTION_S)
    async with client_disconnect(request.receive) as disconnect:
        await endpoint.long_poll.wait_for(job_topic(job.id), lambda: job.status.final or None, wait_s, disconnect)
    return JSONResponse(job.document())


async def status(request: Request, endpoint: RunPodEndpoint) -> Response:
    """GET /status/{id}?ttl=ms: the job's state; `ttl` shortens or extends how long its result is kept."""
    job = _job(request, endpoint)
    if "ttl" in request.query_params:
        endpoint.queue.set_result_ttl(job, _milliseconds(request, "ttl", 0, _RESULT_TTL_RANGE_MS) / 1000)
    return JSONResponse(job.document())


async def stream(request: Request, endpoint: RunPodEndpoint) -> Response:
    """GET /stream/{id}: the outputs since the last call; each is returned once."""
    job = _job(request, endpoint)

    def poll() -> bool | None:
        return job.status.final or len(job.outputs) > job.streamed or None

    async with client_disconnect(request.receive) as disconnect:
        await endpoint.long_poll.wait_for(job_topic(job.id), poll, _STREAM_WAIT_S, disconnect)
        if disconnect.done():
            # Keep the outputs for the next call: nobody would receive them.
            return Response(status_code=HTTPStatus.NO_CONTENT)
        outputs = endpoint.queue.read_stream(job)
    return JSONResponse({"status": job.status, "stream": [{"output": output} for output in outputs]})


async def cancel(request: Request, endpoint: RunPodEndpoint) -> Response:
    """POST /cancel/{id}: cancel a job that waits or runs."""
    job = endpoint.queue.cancel(request.path_params["job"])
    return JSONResponse({"id": job.id, "status": job.status})


async def retry(request: Request, endpoint: RunPodEndpoint) -> Response:
    """POST /retry/{id}: queue a failed or timed-out job again."""
    job = endpoint.queue.retry(request.path_params["job"])
    return JSONResponse({"id": job.id, "status": job.status})


async def purge_queue(_request: Request, endpoint: RunPodEndpoint) -> Response:
    """POST /purge-queue: cancel all waiting jobs."""
    return JSONResponse({"removed": endpoint.queue.purge(), "status": "completed"})


async def health(_request: Request, endpoint: RunPodEndpoint) -> Response:
    """GET /health: counts of jobs and workers by state."""
    return JSONResponse({"jobs": endpoint.queue.health(), "workers": endpoint.fleet.health()})


def _route(path: str, operation: _Operation, *methods: str) -> Route:
    """Return a route that checks the API key and the operation's rate limit."""
    name = path.partition("/")[0]

    async def serve(request: Request) -> Response:
        authorize(request)
        endpoint = endpoint_of(request)
        if not endpoint.settings.rate_limits:
            return await operation(request, endpoint)
        with endpoint.limiter.admit(name):
            return await operation(request, endpoint)

    return Route("/v2/{endpoint}/" + path, serve, methods=list(methods))


async def _read_submission(request: Request, max_bytes: int) -> Submission:
    value = parse_json(await read_body(request, max_bytes))
    try:
        submission = Submission.model_validate(value)
    except ValidationError as error:
        raise BadRequestError(describe_validation_error(error)) from None
    if submission.input is None:
        raise BadRequestError("input: must not be null")
    return submission


def _job(request: Request, endpoint: RunPodEndpoint) -> Job:
    return endpoint.queue.job(request.path_params["job"])


def _milliseconds(request: Request, name: str, default: int, limits: tuple[int, int]) -> int:
    """Return a number of milliseconds from the query, clamped to its documented limits."""
    text = request.query_params.get(name, str(default))
    value = parse_integer(text)
    if value is None:
        raise BadRequestError(f"{name}={text[:50]!r}: expected an integer number of milliseconds")
    return min(max(value, limits[0]), limits[1])


routes = [
    _route("run", run, "POST"),
    _route("runsync", runsync, "POST"),
    # The documentation lists GET; its older versions listed GET and POST.
    _route("status/{job}", status, "GET", "POST"),
    _route("stream/{job}", stream, "GET", "POST"),
    _route("cancel/{job}", cancel, "POST"),
    _route("retry/{job}", retry, "POST"),
    _route("purge-queue", purge_queue, "POST"),
    _route("health", health, "GET"),
]
