"""All errors that the emulator raises itself, in one tree.

EmulatorError
├── SettingsError                the emulator cannot start with these settings
└── APIError                     one request is answered with this error's status
    ├── BadRequestError          400: the body or a parameter is invalid
    ├── JobNotAssignedError      400: the worker posts for a job that is not assigned to it
    ├── JobStateError            400: the job's state does not allow this
    ├── NoWorkerError            400: no worker of a load-balancing endpoint was available in time
    ├── UnauthorizedError        401: no valid API key
    ├── NotFoundError            404: no such endpoint, job or worker
    ├── AffinityWorkerGoneError  404: the only worker that a request may have is gone
    ├── ContentTooLargeError     413: a client's body exceeds the documented limit
    ├── TooManyRequestsError     429: a documented rate limit is exceeded, or the queue is full
    ├── RequestTimeoutError      408: Spirit: no answer within the documented time
    ├── HandlingError            500: Spirit: the worker failed, or what was asked cannot be done
    ├── BadGatewayError          502: the worker of a load-balancing endpoint broke the connection
    ├── UnavailableError         503: Spirit: no worker can come
    └── ProcessingTimeoutError   524: the worker of a load-balancing endpoint took too long
"""

from __future__ import annotations

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


class NotFoundError(APIError):
    """There is no such endpoint, job or worker."""

    status = HTTPStatus.NOT_FOUND
    type = "NotFoundError"


class ContentTooLargeError(APIError):
    """A client's body exceeds the documented limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    type = "RequestTooLargeError"


class TooManyRequestsError(APIError):
    """A documented rate limit is exceeded, or the queue is full."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    type = "RateLimitError"


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
