"""All errors that the emulator raises itself, in one tree.

EmulatorError
├── SettingsError                the emulator cannot start with these settings
└── APIError                     one request is answered with this error's status
    ├── BadRequestError          400: the body or a parameter is invalid
    ├── JobNotAssignedError      400: the worker posts for a job that is not assigned to it
    ├── JobStateError            400: the job's state does not allow this
    ├── NoWorkerError            400: no worker of a load-balancing endpoint was available in time
    ├── UnauthorizedError        401: no valid API key
    ├── ForbiddenError           403: the API key is valid, but may not do this
    ├── NotFoundError            404: no such endpoint, job or worker
    ├── AffinityWorkerGoneError  404: the only worker that a request may have is gone
    ├── ContentTooLargeError     413: a client's body exceeds the documented limit
    ├── UnprocessableError       422: a body or parameter of the control plane violates its description
    ├── TooManyRequestsError     429: a documented rate limit is exceeded, or the queue is full
    │   └── QuotaExceededError   429: the control plane's quota is used up
    ├── RequestTimeoutError      408: Spirit: no answer within the documented time
    ├── HandlingError            500: Spirit: the worker failed, or what was asked cannot be done
    ├── BadGatewayError          502: the worker of a load-balancing endpoint broke the connection
    ├── UnavailableError         503: Spirit: no worker can come
    └── ProcessingTimeoutError   524: the worker of a load-balancing endpoint took too long
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import ClassVar


class EmulatorError(Exception):
    """Base of all errors of the emulator; the message says what to change."""


class SettingsError(EmulatorError):
    """The emulator cannot start with these settings."""


class APIError(EmulatorError):
    """One request fails: `status` is the response's status, `type` is the OpenAI API's name for the error."""

    status: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST
    type: ClassVar[str] = "BadRequestError"


class BadRequestError(APIError):
    """The body or a parameter is invalid."""


class JobNotAssignedError(APIError):
    """A worker posts for a job that is not, or no longer, assigned to it."""


class JobStateError(APIError):
    """The job's state does not allow this."""


class UnauthorizedError(APIError):
    """The request has no valid API key."""

    status = HTTPStatus.UNAUTHORIZED
    type = "AuthenticationError"


class ForbiddenError(APIError):
    """The API key is valid, but does not grant access to this."""

    status = HTTPStatus.FORBIDDEN
    type = "PermissionDeniedError"


class NotFoundError(APIError):
    """There is no such endpoint, job or worker."""

    status = HTTPStatus.NOT_FOUND
    type = "NotFoundError"


class ContentTooLargeError(APIError):
    """A client's body exceeds the documented limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    type = "RequestTooLargeError"


class UnprocessableError(APIError):
    """A body or a parameter of the control plane violates its description.

    Args:
        message: what is wrong.
        errors: each violation.
    """

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    type = "UnprocessableEntityError"

    def __init__(self, message: str, errors: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.errors = tuple(errors)


class TooManyRequestsError(APIError):
    """A documented rate limit is exceeded, or the queue is full."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    type = "RateLimitError"


class QuotaExceededError(TooManyRequestsError):
    """The control plane's quota of a window is used up.

    Args:
        window: the window's name.
        retry_after_s: when it ends.
    """

    def __init__(self, window: str, retry_after_s: int) -> None:
        super().__init__(f"rate limit exceeded for the {window} window")
        self.retry_after_s = retry_after_s


class RequestTimeoutError(APIError):
    """There is no answer within the documented time."""

    status = HTTPStatus.REQUEST_TIMEOUT
    type = "TimeoutError"


class HandlingError(APIError):
    """The worker failed, or what was asked cannot be done."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    type = "InternalServerError"


class UnavailableError(APIError):
    """No worker can come."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    type = "ServiceUnavailableError"


class NoWorkerError(APIError):
    """No worker of a load-balancing endpoint was available in time."""

    type = "ServiceUnavailableError"


class AffinityWorkerGoneError(NotFoundError):
    """The only worker that a request may have is gone."""


class BadGatewayError(APIError):
    """The worker of a load-balancing endpoint broke the connection."""

    status = HTTPStatus.BAD_GATEWAY
    type = "BadGatewayError"


class ProcessingTimeoutError(APIError):
    """The worker of a load-balancing endpoint took too long.

    Cloudflare's status, which `http.HTTPStatus` does not have.
    """

    status = 524  # type: ignore[assignment]
    type = "TimeoutError"
