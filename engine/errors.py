"""Every error that the worker raises itself, in one tree.

WorkerError
├── ConfigurationError        the worker cannot start as it is configured
├── BusyError                 the platform asks us to wait
├── DeliveryError             a delivery did not arrive; another try may succeed
├── RefusedDeliveryError      the platform does not want a delivery, and will not
└── JobError                  one job ends with this error; the worker goes on
    ├── InvalidInputError     400: the job's input is not one that we accept
    ├── ClosedRouteError      403: the route is not one that a job may call
    ├── UnknownRouteError     404: vLLM has no such route
    ├── RefusedError          vLLM answered with an error status, or ended a stream with an error; its body is passed on
    ├── TooLargeError         413: the job's result is larger than the platform takes
    ├── RefusedOutputError    500: the platform did not take an output or the result of the job, and will not
    ├── InternalError         500: the worker failed at this job, and would again
    ├── EngineError           500: the engine broke off without an answer; another try may succeed
    ├── StoppedError          503: the worker ends before the job did; another worker may run it
    └── TimedOutError         504: the job has run for longer than a job may

`retryable` is true for what another try can help: an engine that broke off, a worker that ends, an output that did not
arrive, and vLLM's own statuses 429, 502, 503 and 504. It is false for a 500 of vLLM's: the engine lives (a job of one
that does not ends with 503), so it is the request that it stumbled over, such as a grammar that cannot be compiled.
"""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import Any, ClassVar

# Statuses of vLLM's that another try may not get.
_PASSING = {
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}


class WorkerError(Exception):
    """Base of all errors of this worker; the message is one that a person can act on."""


class ConfigurationError(WorkerError):
    """The worker cannot start as it is configured; the message names the variable and what is allowed."""


class BusyError(WorkerError):
    """The platform asks us to wait."""


class DeliveryError(WorkerError):
    """A delivery did not arrive, or it cannot be known whether it did; another try may succeed."""


class RefusedDeliveryError(WorkerError):
    """The platform does not want a delivery, and will not; `status` is the HTTP status that says so, where known."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class JobError(WorkerError):
    """One job ends with this error.

    `document` is what a client gets: an OpenAI-style error body (`{"error": {"message", "type", "param", "code"}}`)
    with two more fields beside it, `status` (the HTTP status that the same request would have had) and `retryable`
    (whether the same job may succeed on another try).
    """

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    type: ClassVar[str] = "InternalServerError"
    retryable: ClassVar[bool] = False

    def document(self) -> dict[str, Any]:
        """The error body, ready for JSON."""
        error = {"message": str(self), "type": self.type, "param": None, "code": self.status.value}
        return {"error": error, "status": self.status.value, "retryable": self.retryable}

    def output(self) -> dict[str, str]:
        """The job output that ends the job as failed.

        The value is a JSON *string*: the SDK passes an error through `str()`, which turns anything else into a
        Python repr (runpod 1.12.0, `rp_job.handle_job`).
        """
        return {"error": json.dumps(self.document(), ensure_ascii=False)}


class InvalidInputError(JobError):
    """The job's input is not one that we accept."""

    status = HTTPStatus.BAD_REQUEST
    type = "BadRequestError"


class ClosedRouteError(JobError):
    """The route is not one that a job may call."""

    status = HTTPStatus.FORBIDDEN
    type = "PermissionDeniedError"

    def __init__(self, route: str, open_routes: list[str]) -> None:
        super().__init__(
            f"{route} is not open to jobs. Open are {', '.join(open_routes)}; ALLOWED_ROUTES of the worker opens more"
        )


class UnknownRouteError(JobError):
    """VLLM has no such route."""

    status = HTTPStatus.NOT_FOUND
    type = "NotFoundError"

    def __init__(self, route: str) -> None:
        super().__init__(f"vLLM has no route {route} for this model")


class RefusedError(JobError):
    """vLLM's app answered with an error status: `body` is its error body, unchanged."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"vLLM answered with status {status}")
        self._status = status
        self._body = body

    def document(self) -> dict[str, Any]:
        """VLLM's own error body with `status` and `retryable` beside it."""
        return {**self._body, "status": self._status, "retryable": self._status in _PASSING}


class InternalError(JobError):
    """The worker failed at this job, and would again."""


class EngineError(JobError):
    """The engine broke off without an answer; another try may succeed."""

    retryable = True


class TooLargeError(JobError):
    """The job's result, or an output of it, is larger than the platform takes.

    Args:
        what: "result" or "output".
        size_bytes: its size.
        limit_bytes: the platform's limit, where it is known.
    """

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    type = "PayloadTooLargeError"

    def __init__(self, what: str, size_bytes: int, limit_bytes: int | None = None) -> None:
        takes = "less" if limit_bytes is None else f"at most {limit_bytes}"
        super().__init__(f"the {what} has {size_bytes} bytes, and the platform takes {takes}: ask for less in one job")


class RefusedOutputError(JobError):
    """The platform did not take an output or the result of the job, and will not; its size, in bytes, may be why."""

    def __init__(self, what: str, size_bytes: int, refusal: str) -> None:
        super().__init__(f"the platform refused the {what}, which has {size_bytes} bytes: {refusal}")


class StoppedError(JobError):
    """The worker ends before the job did; another worker may run it."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    type = "ServiceUnavailableError"
    retryable = True


class TimedOutError(JobError):
    """The job has run for longer than a job may; in seconds."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    type = "TimeoutError"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the job has run for {limit_s:g} s, which is as long as EXECUTION_TIMEOUT_S lets a job run")


def error_text(output: Any) -> str | None:
    """Return the error of an output that ends its job as failed (`JobError.output`), or None for any other output.

    An answer of vLLM's may hold an `error` as well, as a response does: it has other fields too.
    """
    error = output.get("error") if isinstance(output, dict) and len(output) == 1 else None
    return error if isinstance(error, str) and error else None


_URL = re.compile(r"\S*://\S*")


def described(error: BaseException) -> str:
    """The type and message of an error, for the log and for clients, without URLs: the platform's hold its keys."""
    return f"{type(error).__name__}: {_URL.sub('(URL)', str(error))}"
