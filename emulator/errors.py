"""Every error that the emulator raises itself, in one tree.

EmulatorError
├── ConfigurationError           the emulator cannot start as it is configured
└── RefusedError                 one request is answered with this error's status
    ├── InvalidRequestError      400: the body or a parameter is not one that the platform accepts
    ├── NotHeldError             400: a delivery for a job that this worker does not hold
    ├── WrongStateError          400: the job is not in a state that allows this
    ├── UnauthorizedError        401: no API key, or not one of ours
    ├── NotFoundError            404: no such endpoint, job or worker
    ├── TooLargeError            413: a client's body is above the documented limit
    └── TooManyRequestsError     429: above a documented rate, or the queue is full
"""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar


class EmulatorError(Exception):
    """Base of all errors of the emulator; the message is one that a person can act on."""


class ConfigurationError(EmulatorError):
    """The emulator cannot start as it is configured."""


class RefusedError(EmulatorError):
    """One request is refused: `status` is the answer's status, `type` names the error as the OpenAI API would."""

    status: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST
    type: ClassVar[str] = "BadRequestError"


class InvalidRequestError(RefusedError):
    """The body or a parameter is not one that the platform accepts."""


class NotHeldError(RefusedError):
    """A delivery for a job that this worker does not hold, or no longer holds."""


class WrongStateError(RefusedError):
    """The job is not in a state that allows this."""


class UnauthorizedError(RefusedError):
    """No API key, or not one of ours."""

    status = HTTPStatus.UNAUTHORIZED
    type = "AuthenticationError"


class NotFoundError(RefusedError):
    """No such endpoint, job or worker."""

    status = HTTPStatus.NOT_FOUND
    type = "NotFoundError"


class TooLargeError(RefusedError):
    """A client's body is above the documented limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    type = "RequestTooLargeError"


class TooManyRequestsError(RefusedError):
    """Above a documented rate, or the queue is full."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    type = "RateLimitError"
