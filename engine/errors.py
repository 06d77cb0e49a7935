"""Every error that the worker raises itself, in one tree.

WorkerError
├── ConfigurationError        the worker cannot start as it is configured
└── JobError                  one job ends with this error; the worker goes on
├── InvalidInputError     400: the job's input is not one that we accept
├── RefusedError          vLLM answered with an error status; its body is passed on as it is
└── EngineError           500: the engine broke off without an answer; another try may succeed
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any, ClassVar


class WorkerError(Exception):
    """Base of all errors of this worker; the message is one that a person can act on."""


class ConfigurationError(WorkerError):
    """The worker cannot start as it is configured; the message names the variable and what is allowed."""


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


class RefusedError(JobError):
    """vLLM's app answered with an error status: `body` is its error body, unchanged."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"vLLM answered with status {status}")
        self._status = status
        self._body = body

    def document(self) -> dict[str, Any]:
        """VLLM's own error body with `status` and `retryable` beside it."""
        retryable = self._status >= HTTPStatus.INTERNAL_SERVER_ERROR or self._status == HTTPStatus.TOO_MANY_REQUESTS
        return {**self._body, "status": self._status, "retryable": retryable}


class EngineError(JobError):
    """The engine broke off without an answer; another try may succeed."""

    retryable = True
