"""The OpenAI gateway: a request to `/v2/{endpoint}/openai/v1/...` is a job, and the job's outputs are the response.

A streaming job's outputs are server-sent events as text, which are forwarded as they arrive. Any other job's output is
one JSON value. A failed job's error gives the response's status and body: it is the JSON document
`{"error": {"message", "type", "param", "code"}, "status": 400, ...}`, or any other text, which gets the status 500.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from emulator.api.auth import authorize, context_of, endpoint_of, key_of
from emulator.api.bodies import CLIENT_CLOSED_REQUEST, JSONResponse, parse_json, read_body
from emulator.core.job import MAX_RUNSYNC_BODY_BYTES, RUNSYNC_RETENTION_S, Job, JobStatus, Submission
from emulator.core.job_queue import job_topic
from emulator.core.long_poll import Disconnect, client_disconnect
from emulator.core.runpod_endpoint import RunPodEndpoint
from emulator.errors import APIError, BadRequestError, UnauthorizedError

logger = logging.getLogger(__name__)

_BOOLEAN = TypeAdapter(bool)

# Longer than any job: its policy's `ttl`, at most seven days, ends it.
_NO_TIMEOUT_S = 8 * 24 * 3600.0
_DONE_EVENT = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Failure:
    """How a request failed: a status and an error body."""

    status: int
    body: dict[str, Any]

    @classmethod
    def of(cls, status: int, message: str, kind: str = "InternalServerError") -> Failure:
        """Return a failure with an error body of the OpenAI API."""
        return cls(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    def response(self) -> JSONResponse:
        """Return the failure as a response."""
        return JSONResponse(self.body, status_code=self.status)

    def event(self) -> str:
        """Return the failure as the last event of a stream that has started."""
        return f"data: {json.dumps(self.body)}\n\n"


def failure_of(job: Job) -> Failure | None:
    """Return how a job failed, None if it did not."""
    match job.status:
        case JobStatus.FAILED:
            return _parse_error(job.error or "")
        case JobStatus.TIMED_OUT:
            return Failure.of(HTTPStatus.GATEWAY_TIMEOUT, f"the job timed out: {job.error}", "TimeoutError")
        case JobStatus.CANCELLED:
            return Failure.of(CLIENT_CLOSED_REQUEST, "the job was cancelled", "CancelledError")
    return None


def _parse_error(error: str) -> Failure:
    """Return the failure that a worker's error text describes."""
    document = _parse_json_or_text(error)
    if not isinstance(document, dict):
        return Failure.of(HTTPStatus.INTERNAL_SERVER_ERROR, error)
    if not isinstance(document.get("error"), dict):
        # An exception as the SDK reports it: `error_type`, `error_message`, `error_traceback`, ...
        return Failure.of(HTTPStatus.INTERNAL_SERVER_ERROR, str(document.get("error_message", error)))
    status = document.get("status", document["error"].get("code"))
    is_error_status = isinstance(status, int) and HTTPStatus.BAD_REQUEST <= status < 600  # noqa: PLR2004 (the last status)
    body = {name: value for name, value in document.items() if name not in ("status", "retryable")}
    return Failure(status if is_error_status else HTTPStatus.INTERNAL_SERVER_ERROR, body)


async def route_by_path(request: Request) -> Response:
    """`/v2/{endpoint}/openai/v1/...`, with an API key."""
    return await _serve(request, _endpoint_of_path)


async def route_by_key(request: Request) -> Response:
    """`/v1/...`, with `{endpoint}-{key}` as the API key."""
    return await _serve(request, _endpoint_of_key)


async def _serve(request: Request, find_endpoint: Callable[[Request], RunPodEndpoint]) -> Response:
    try:
        return await _run_job(request, find_endpoint(request))
    except APIError as error:
        return Failure.of(error.status, str(error), error.type).response()


def _endpoint_of_path(request: Request) -> RunPodEndpoint:
    authorize(request)
    return endpoint_of(request)


def _endpoint_of_key(request: Request) -> RunPodEndpoint:
    context = context_of(request)
    key = key_of(request)
    for name, endpoint in context.endpoints.items():
        is_key = key.startswith(f"{name}-") and context.is_api_key(key.removeprefix(f"{name}-"))
        if is_key and isinstance(endpoint, RunPodEndpoint):
            return endpoint
    raise UnauthorizedError("no valid endpoint and API key; send 'Authorization: Bearer ENDPOINT-KEY'")


async def _run_job(request: Request, endpoint: RunPodEndpoint) -> Response:
    with ExitStack() as rate_limit:
        # The documentation limits POST only. A stream counts until its end.
        if endpoint.settings.rate_limits and request.method == "POST":
            rate_limit.enter_context(endpoint.limiter.admit("openai"))
        job, streaming = await _submit(request, endpoint)
        if not await _wait_for_status(request, endpoint, job, streaming=streaming):
            logger.info("the client of job %s disconnected", job.id)
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if streaming and job.outputs:
            return _EventStream(endpoint, job, rate_limit.pop_all())
        failure = failure_of(job)
        return JSONResponse(_response_body(job)) if failure is None else failure.response()


async def _submit(request: Request, endpoint: RunPodEndpoint) -> tuple[Job, bool]:
    """Submit the request's job; return it, and whether its response streams."""
    route = f"/v1/{request.path_params['path']}"
    query = f"?{request.url.query}" if request.url.query else ""
    job_input: dict[str, Any] = {"openai_route": route + query}
    streaming = False
    if request.method == "POST":
        body = parse_json(await read_body(request, MAX_RUNSYNC_BODY_BYTES))
        if not isinstance(body, dict):
            raise BadRequestError("the body is not a JSON object")
        job_input["openai_input"] = body
        streaming = _is_true(body.get("stream"))
    submission = Submission(input=job_input)
    return endpoint.queue.submit(submission, prefix="sync-", kind=route, retention_s=RUNSYNC_RETENTION_S), streaming


def _is_true(value: Any) -> bool:
    """Return whether vLLM reads the value as true: like pydantic, it accepts `"true"`, `"1"` and `1`."""
    try:
        return _BOOLEAN.validate_python(value)
    except ValidationError:
        return False


async def _wait_for_status(request: Request, endpoint: RunPodEndpoint, job: Job, *, streaming: bool) -> bool:
    """Wait until the response's status is known: for a stream's first output, or for the job's end.

    Returns:
        False if the client disconnected before; its job is cancelled.
    """

    def poll() -> bool | None:
        return job.status.final or (streaming and bool(job.outputs)) or None

    try:
        async with client_disconnect(request.receive) as disconnect:
            known = await endpoint.long_poll.wait_for(job_topic(job.id), poll, _NO_TIMEOUT_S, disconnect)
            return known is not None
    finally:
        if poll() is None:
            endpoint.queue.cancel(job.id)


class _EventStream(Response):
    """A job's outputs as they arrive, until `data: [DONE]` or the job's end.

    A client that disconnects earlier cancels the job. A client that has received `data: [DONE]` does not wait for the
    job's result and may disconnect, as OpenAI's does: the job ends by itself.

    Args:
        endpoint: endpoint of the job.
        job: a job with at least one output.
        rate_limit: closed at the end of the stream, which counts as a running request until then.
    """

    media_type = "text/event-stream"

    def __init__(self, endpoint: RunPodEndpoint, job: Job, rate_limit: ExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        # The response's length is not known.
        del self.headers["content-length"]
        self._rate_limit = rate_limit
        self._endpoint = endpoint
        self._job = job
        self._complete = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        with self._rate_limit:
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async with client_disconnect(receive) as disconnect, aclosing(self._events(disconnect)) as events:
                    async for event in events:
                        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
                await send({"type": "http.response.body"})
            finally:
                # A slow reader may be here after the job has ended, and even after its retention.
                if not self._complete and not self._job.status.final:
                    self._endpoint.queue.cancel(self._job.id)

    async def _events(self, disconnect: Disconnect) -> AsyncGenerator[str, None]:
        """Yield outputs as they arrive, and an error event if the job fails; stop when the client disconnects."""
        job = self._job
        outputs, sent, error_sent = job.outputs, 0, False

        def poll() -> bool | None:
            return job.status.final or len(outputs) > sent or job.outputs is not outputs or None

        while await self._endpoint.long_poll.wait_for(job_topic(job.id), poll, _NO_TIMEOUT_S, disconnect):
            if job.outputs is not outputs:
                # The job was queued again. Its next worker would start over, but what was sent cannot be taken back.
                message = "the worker was lost before the response was complete"
                yield Failure.of(HTTPStatus.INTERNAL_SERVER_ERROR, message).event()
                return
            ended = job.status.final
            new_outputs = outputs[sent:]
            sent += len(new_outputs)
            for output in new_outputs:
                text = output if isinstance(output, str) else f"data: {json.dumps(output)}\n\n"
                self._complete = text.endswith(_DONE_EVENT)
                error_sent = error_sent or _has_error(text)
                yield text
            if ended and not error_sent:
                failure = failure_of(job)
                if failure is not None:
                    yield failure.event()
            if ended or self._complete:
                return


def _has_error(text: str) -> bool:
    """Return whether one of the events is an error, as OpenAI's and Anthropic's clients read it."""
    for line in text.split("\n"):
        if line.startswith("data:") and ('"error"' in line or "response.failed" in line):
            event = _parse_json_or_text(line.removeprefix("data:"))
            if isinstance(event, dict) and (event.get("error") or event.get("type") == "response.failed"):
                return True
    return False


def _response_body(job: Job) -> Any:
    """Return the value of a job that did not stream: its result's output, or what it streamed instead."""
    is_single = job.output is not None and not isinstance(job.output, list)
    values = [job.output] if is_single else job.output or job.outputs
    if not values:
        return job.output
    if len(values) == 1:
        value = values[0]
        return _parse_json_or_text(value) if isinstance(value, str) else value
    if all(isinstance(value, str) for value in values):
        return _parse_json_or_text("".join(values))
    return values


def _parse_json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


routes = [
    Route("/v2/{endpoint}/openai/v1/{path:path}", route_by_path, methods=["GET", "POST"]),
    Route("/v1/{path:path}", route_by_key, methods=["GET", "POST"]),
]
