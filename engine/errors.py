"""Every error that the worker raises itself, in one tree.

WorkerError
├── ConfigurationError        the worker cannot start with this configuration
├── RateLimitedError          the platform asks the worker to wait
├── UnusableQueueError        the platform gives this worker no job any more
├── DeliveryError             a delivery did not arrive; another attempt may succeed
├── RefusedDeliveryError      the platform does not accept a delivery, and will not
└── JobError                  one job ends with this error; the worker continues
    ├── InvalidInputError     400: the job's input is not accepted
    ├── RouteNotAllowedError  403: clients may not call the route
    ├── FileNotAllowedError   403: jobs may not read the file
    ├── UnknownRouteError     404: vLLM has no such route
    ├── EngineResponseError   vLLM answered with an error status, or ended a stream with an error; passed on unchanged
    ├── ExpiredError          408: the job waited in the queue for longer than its client allows
    ├── EngineFullError       429: the engine cannot start another request now
    ├── TooLargeError         413: the job's result, or an output, is larger than the platform accepts
    ├── RefusedOutputError    500: the platform does not accept an output or the result of the job, and will not
    ├── BucketError           500: a result that is too large for the platform could not be uploaded to the bucket
    │   └── BucketUnavailableError  503: it did not answer; another attempt may succeed
    ├── InternalError         500: the worker failed at this job, and would fail again
    ├── EngineError           500: the engine stopped without a response; another attempt may succeed
    ├── WorkerShutdownError   503: the worker ends before the job did; another worker may run it
    ├── LoadingError          503: the worker does not serve yet
    └── TimedOutError         504: the job or request has run for longer than the worker allows

`retryable` is true where another attempt can help: the engine stopped, the worker ends, an output did not arrive, or
vLLM answered with status 429, 502, 503 or 504. It is false for status 500: the engine is alive (a job of a dead engine
ends with 503), so the request itself caused the error, as a grammar does that cannot be compiled.
"""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from pathlib import PurePath
from typing import Any, ClassVar

_RETRYABLE_STATUSES = {
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}


class WorkerError(Exception):
    """Base of all errors of this worker. The message says what to do."""


class ConfigurationError(WorkerError):
    """The worker cannot start with this configuration; the message names the variable and what is allowed."""


class RateLimitedError(WorkerError):
    """The platform asks the worker to wait."""


class UnusableQueueError(WorkerError):
    """The platform says that this worker gets no job any more; the message is the reason."""


class DeliveryError(WorkerError):
    """A delivery did not arrive, or it is unknown whether it did; another attempt may succeed."""


class RefusedDeliveryError(WorkerError):
    """The platform does not accept a delivery, and will not; `status` is the HTTP status, where known."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class JobError(WorkerError):
    """One job ends with this error.

    `document` is what a client gets: an OpenAI-style error body (`{"error": {"message", "type", "param", "code"}}`)
    with two more fields, `status` (the HTTP status of the same request to a server) and `retryable` (whether the same
    job may succeed on another attempt).
    """

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    type: ClassVar[str] = "InternalServerError"
    retryable: ClassVar[bool] = False

    def document(self) -> dict[str, Any]:
        """Return the error body, ready for JSON."""
        error = {"message": str(self), "type": self.type, "param": None, "code": self.status.value}
        return {"error": error, "status": self.status.value, "retryable": self.retryable}

    def output(self) -> dict[str, str]:
        """Return the job output that ends the job as failed.

        The value is a JSON *string*: the SDK passes an error through `str()`, which turns anything else into a
        Python repr (runpod 1.12.0, `rp_job.handle_job`).
        """
        return {"error": json.dumps(self.document(), ensure_ascii=False)}


class InvalidInputError(JobError):
    """The job's input is not accepted."""

    status = HTTPStatus.BAD_REQUEST
    type = "BadRequestError"


class RouteNotAllowedError(JobError):
    """Clients may not call the route, by a job or over HTTP."""

    status = HTTPStatus.FORBIDDEN
    type = "PermissionDeniedError"

    def __init__(self, route: str, open_routes: list[str]) -> None:
        super().__init__(
            f"clients may not call {route}. Allowed: {', '.join(open_routes)}. ALLOWED_ROUTES of the worker allows more"
        )


class FileNotAllowedError(JobError):
    """Jobs may not read the file that one names; `volume` is where they may."""

    status = HTTPStatus.FORBIDDEN
    type = "PermissionDeniedError"

    def __init__(self, volume: PurePath) -> None:
        super().__init__(
            f"jobs may read files below {volume} only, the network volume (NETWORK_VOLUME of the worker): name one "
            "there, or send the file as a URL or in base64"
        )


class UnknownRouteError(JobError):
    """vLLM has no such route."""

    status = HTTPStatus.NOT_FOUND
    type = "NotFoundError"

    def __init__(self, route: str) -> None:
        super().__init__(f"vLLM has no route {route} for this model")


class EngineResponseError(JobError):
    """vLLM's app answered with an error status; `body` is its error body, unchanged."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"vLLM answered with status {status}")
        self._status = status
        self._body = body

    def document(self) -> dict[str, Any]:
        """Return vLLM's own error body with `status` and `retryable` added."""
        return {**self._body, "status": self._status, "retryable": self._status in _RETRYABLE_STATUSES}


class ExpiredError(JobError):
    """The job waited in the queue for longer than its client allows."""

    status = HTTPStatus.REQUEST_TIMEOUT
    type = "TimeoutError"


class InternalError(JobError):
    """The worker failed at this job, and would fail again."""


class EngineError(JobError):
    """The engine stopped without a response; another attempt may succeed."""

    retryable = True


class EngineFullError(JobError):
    """The engine cannot start another request now."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    type = "RateLimitError"
    retryable = True


class TooLargeError(JobError):
    """The job's result, or an output of it, is larger than the platform accepts.

    Args:
        what: "result" or "output".
        size_bytes: its size.
        limit_bytes: the platform's limit, where it is known.
    """

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    type = "PayloadTooLargeError"

    def __init__(self, what: str, size_bytes: int, limit_bytes: int | None = None) -> None:
        limit = "less" if limit_bytes is None else f"at most {limit_bytes}"
        instead = ", or give the worker a bucket (BUCKET_ENDPOINT_URL)" if what == "result" else ""
        super().__init__(
            f"the {what} has {size_bytes} bytes, and the platform accepts {limit}: ask for less in one job{instead}"
        )


class RefusedOutputError(JobError):
    """The platform does not accept an output or the result of the job; its size, in bytes, may be the reason."""

    def __init__(self, what: str, size_bytes: int, refusal: str) -> None:
        super().__init__(f"the platform refused the {what}, which has {size_bytes} bytes: {refusal}")


class BucketError(JobError):
    """The bucket does not accept a result that is too large for the platform.

    Args:
        size_bytes: of the result.
        bucket: its name.
        reason: S3's error code, or the kind of error.
    """

    advice: ClassVar[str] = (
        "check BUCKET_ENDPOINT_URL, BUCKET_NAME, BUCKET_REGION and the keys of the worker, or ask for less in one job"
    )

    def __init__(self, size_bytes: int, bucket: str, reason: str) -> None:
        super().__init__(
            f"the result has {size_bytes} bytes, more than the platform accepts, and could not be uploaded to the "
            f"bucket {bucket} ({reason}): {self.advice}"
        )


class BucketUnavailableError(BucketError):
    """The bucket did not answer, in several attempts."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    type = "ServiceUnavailableError"
    retryable = True
    advice = "send the job again later, or ask for less in one job"


class WorkerShutdownError(JobError):
    """The worker ends before the job did; another worker may run it."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    type = "ServiceUnavailableError"
    retryable = True


class LoadingError(JobError):
    """The worker does not serve yet."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    type = "ServiceUnavailableError"
    retryable = True


class TimedOutError(JobError):
    """The job, or the HTTP request, has run for longer than `limit_s` seconds."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    type = "TimeoutError"

    def __init__(self, limit_s: float) -> None:
        super().__init__(
            f"the request has run for {limit_s:g} s, the limit that EXECUTION_TIMEOUT_S or the platform sets"
        )


def error_text(output: Any) -> str | None:
    """Return the error of an output that ends its job as failed (`JobError.output`), or None for any other output.

    A response of vLLM may have a field `error` as well, as those of `/v1/responses` do, but other fields too.
    """
    error = output.get("error") if isinstance(output, dict) and len(output) == 1 else None
    return error if isinstance(error, str) and error else None


_URL = re.compile(r"\S*://\S*")


def without_urls(text: str) -> str:
    """Return a text for logs and clients without its URLs: the platform's hold keys, and so do signed ones."""
    return _URL.sub("(URL)", text)


def safe_str(error: BaseException) -> str:
    """Return the type and message of an error, for logs and clients, without URLs."""
    return f"{type(error).__name__}: {without_urls(str(error))}"
