"""The OpenAI gateway: a request to `/v2/{endpoint}/openai/v1/...` is a job, and its outputs are the answer.

A job that streams gives server-sent events as text, which is passed on as it comes. A job that does not gives one JSON
value. A job that fails gives an error, whose status and body the client gets: its error is a JSON document
`{"error": {"message", "type", "param", "code"}, "status": 400, ...}` in the best case, and a text in the worst.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from emulator.api.auth import JSONResponse, authorize, endpoint_of, key_of, parse_json, platform_of, read_body
from emulator.core.endpoint import Endpoint
from emulator.core.job import RUNSYNC_BODY_BYTES, RUNSYNC_RETENTION_S, Job, JobStatus, Submission
from emulator.core.job_queue import job_topic
from emulator.core.long_poll import HangUp, hang_up_of
from emulator.errors import InvalidRequestError, RefusedError, UnauthorizedError

logger = logging.getLogger(__name__)

_BOOLEAN = TypeAdapter(bool)

# A job always ends, by its policy if by nothing else.
_FOREVER_S = 8 * 24 * 3600.0
_CLIENT_CLOSED_REQUEST = 499
_LAST_EVENT = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Failure:
    """How a request failed: a status and an error body."""

    status: int
    body: dict[str, Any]

    @classmethod
    def of(cls, status: int, message: str, kind: str = "InternalServerError") -> Failure:
        """An error body as the OpenAI API has it."""
        return cls(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    def response(self) -> JSONResponse:
        """The failure as an answer."""
        return JSONResponse(self.body, status_code=self.status)

    def event(self) -> str:
        """The failure as the last event of a stream that has begun."""
        return f"data: {json.dumps(self.body)}\n\n"


def failure_of(job: Job) -> Failure | None:
    """How a job failed, None if it did not."""
    match job.status:
        case JobStatus.FAILED:
            return _failure_of_error(job.error or "")
        case JobStatus.TIMED_OUT:
            return Failure.of(HTTPStatus.GATEWAY_TIMEOUT, f"the job timed out: {job.error}", "TimeoutError")
        case JobStatus.CANCELLED:
            return Failure.of(_CLIENT_CLOSED_REQUEST, "the job was cancelled", "CancelledError")
    return None


def _failure_of_error(error: str) -> Failure:
    """What a worker's error text stands for."""
    try:
        document = json.loads(error)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        return Failure.of(HTTPStatus.INTERNAL_SERVER_ERROR, error)
    if not isinstance(document.get("error"), dict):
        # The SDK's own: `error_type`, `error_message`, `error_traceback`, ...
        return Failure.of(HTTPStatus.INTERNAL_SERVER_ERROR, str(document.get("error_message", error)))
    status = document.get("status", document["error"].get("code"))
    known = isinstance(status, int) and HTTPStatus.BAD_REQUEST <= status < 600  # noqa: PLR2004 (the last status)
    body = {name: value for name, value in document.items() if name not in ("status", "retryable")}
    return Failure(status if known else HTTPStatus.INTERNAL_SERVER_ERROR, body)


async def by_endpoint(request: Request) -> Response:
    """`/v2/{endpoint}/openai/v1/...`, with an API key."""
    try:
        authorize(request)
        return await _serve(request, endpoint_of(request))
    except RefusedError as error:
        return Failure.of(error.status, str(error), error.type).response()


async def by_key(request: Request) -> Response:
    """`/v1/...`, with `{endpoint}-{key}` for a key."""
    try:
        return await _serve(request, _endpoint_of_key(request))
    except RefusedError as error:
        return Failure.of(error.status, str(error), error.type).response()


def _endpoint_of_key(request: Request) -> Endpoint:
    platform = platform_of(request)
    key = key_of(request)
    for name, endpoint in platform.endpoints.items():
        if key.startswith(f"{name}-") and platform.allows(key.removeprefix(f"{name}-")):
            return endpoint
    raise UnauthorizedError("the request names no endpoint and key: send 'Authorization: Bearer ENDPOINT-KEY'")


async def _serve(request: Request, endpoint: Endpoint) -> Response:
    with ExitStack() as admitted:
        # The documentation limits POST alone. A stream counts for as long as it lasts.
        if endpoint.settings.rate_limits and request.method == "POST":
            admitted.enter_context(endpoint.limiter.admit("openai"))
        job, streaming = await _submit(request, endpoint)
        if not await _status_is_known(request, endpoint, job, streaming=streaming):
            logger.info("the client of job %s hung up", job.id)
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        if streaming and job.outputs:
            return _EventStream(endpoint, job, admitted.pop_all())
        failure = failure_of(job)
        return JSONResponse(_value(job)) if failure is None else failure.response()


async def _submit(request: Request, endpoint: Endpoint) -> tuple[Job, bool]:
    """The job that the request stands for, and whether it streams."""
    route = f"/v1/{request.path_params['path']}"
    query = f"?{request.url.query}" if request.url.query else ""
    job_input: dict[str, Any] = {"openai_route": route + query}
    streaming = False
    if request.method == "POST":
        body = parse_json(await read_body(request, RUNSYNC_BODY_BYTES))
        if not isinstance(body, dict):
            raise InvalidRequestError("the body is not a JSON object")
        job_input["openai_input"] = body
        streaming = _is_true(body.get("stream"))
    submission = Submission(input=job_input)
    return endpoint.queue.submit(submission, prefix="sync-", label=route, retention_s=RUNSYNC_RETENTION_S), streaming


def _is_true(value: Any) -> bool:
    """Whether vLLM takes the value for true: it reads `"true"`, `"1"` and `1` as it does `true`."""
    try:
        return _BOOLEAN.validate_python(value)
    except ValidationError:
        return False


async def _status_is_known(request: Request, endpoint: Endpoint, job: Job, *, streaming: bool) -> bool:
    """Wait for the first output of a stream, or for the job's end; return False if the client hung up before."""

    def look() -> bool | None:
        return job.status.final or (streaming and bool(job.outputs)) or None

    try:
        async with hang_up_of(request.receive) as hang_up:
            return await endpoint.waiting.until(job_topic(job.id), look, _FOREVER_S, hang_up) is not None
    finally:
        if look() is None:
            endpoint.queue.cancel(job.id)


class _EventStream(Response):
    """A job's outputs as they come, until OpenAI's last event or the job's end.

    A client that hangs up before cancels the job. One that has the last event does not wait for the job's result, and
    may hang up, as OpenAI's own does: the job ends by itself.
    """

    media_type = "text/event-stream"

    def __init__(self, endpoint: Endpoint, job: Job, admitted: ExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        # The answer's length is not known.
        del self.headers["content-length"]
        self._admitted = admitted
        self._endpoint = endpoint
        self._job = job
        self._complete = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        with self._admitted:
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async with hang_up_of(receive) as hang_up, aclosing(self._events(hang_up)) as events:
                    async for event in events:
                        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
                await send({"type": "http.response.body"})
            finally:
                if not self._complete:
                    self._endpoint.queue.cancel(self._job.id)

    async def _events(self, hang_up: HangUp) -> AsyncGenerator[str, None]:
        """The outputs as they come, and a last event that says why where the job fails; none for who has hung up."""
        job = self._job
        outputs, sent, told = job.outputs, 0, False

        def look() -> bool | None:
            return job.status.final or len(outputs) > sent or job.outputs is not outputs or None

        while await self._endpoint.waiting.until(job_topic(job.id), look, _FOREVER_S, hang_up):
            if job.outputs is not outputs:
                # It was queued anew: another worker begins at the beginning, but what is sent is sent.
                lost = "the worker was lost before the answer was complete"
                yield Failure.of(HTTPStatus.INTERNAL_SERVER_ERROR, lost).event()
                return
            ended = job.status.final
            fresh = outputs[sent:]
            sent += len(fresh)
            for output in fresh:
                text = output if isinstance(output, str) else f"data: {json.dumps(output)}\n\n"
                self._complete = text.endswith(_LAST_EVENT)
                told = told or _has_error(text)
                yield text
            if ended and not told:
                failed = failure_of(job)
                if failed is not None:
                    yield failed.event()
            if ended or self._complete:
                return


def _has_error(text: str) -> bool:
    """Whether the events say already that the answer has failed, as OpenAI's and Anthropic's clients read it."""
    for line in text.split("\n"):
        if line.startswith("data:") and ('"error"' in line or "response.failed" in line):
            event = _parsed(line.removeprefix("data:"))
            if isinstance(event, dict) and (event.get("error") or event.get("type") == "response.failed"):
                return True
    return False


def _value(job: Job) -> Any:
    """The one value of a job that did not stream: the done body's output, or what was streamed in its place."""
    values = job.output if isinstance(job.output, list) and job.output else job.outputs
    if job.output is not None and not isinstance(job.output, list):
        values = [job.output]
    if len(values) == 1:
        value = values[0]
        return _parsed(value) if isinstance(value, str) else value
    if values and all(isinstance(value, str) for value in values):
        return _parsed("".join(values))
    return values


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


routes = [
    Route("/v2/{endpoint}/openai/v1/{path:path}", by_endpoint, methods=["GET", "POST"]),
    Route("/v1/{path:path}", by_key, methods=["GET", "POST"]),
]
