"""What a job's end means for its line: an answer, an error, or another attempt.

    {"id": …, "custom_id": …, "response": {"status_code": 200, "request_id": …, "body": {…}}, "error": null}
    {"id": …, "custom_id": …, "response": {"status_code": 400, "request_id": …, "body": {"error": …}}, "error": null}
    {"id": …, "custom_id": …, "response": null, "error": {"code": "job_timed_out", "message": …}}

The first is a line of the output file; the others are lines of the errors file: the request was answered with an error,
or was not answered.

Source: OpenAI's API reference, "The request output object".
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self

FINAL_STATES = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
_RETRYABLE_STATUSES = {
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        status: the HTTP status of the response; None if there is no response.
        body: the response's body, or the message of an error.
        code: of an error without a response.
        retryable: whether another attempt can help.
        job: id of the job; empty if there was none.
    """

    status: int | None
    body: Any
    code: str = ""
    retryable: bool = False
    job: str = ""

    @property
    def failed(self) -> bool:
        """Whether it belongs into the errors file."""
        return self.status != HTTPStatus.OK

    @classmethod
    def error(cls, code: str, message: str, *, retryable: bool, job: str = "") -> Self:
        """Return an outcome without a response."""
        return cls(None, message, code, retryable, job)

    @classmethod
    def rejected(cls, status: int, message: str, *, job: str = "") -> Self:
        """Return the outcome of a request that the platform itself answered with an error."""
        error = {"message": message, "type": "PlatformError", "param": None, "code": status}
        return cls(status, {"error": error}, job=job)

    @classmethod
    def of_job(cls, job: str, document: dict[str, Any] | None) -> Self:
        """Return the outcome of a job that has ended.

        Args:
            job: its id.
            document: what /status says of it; None if it does not know the job.
        """
        match document:
            case None:
                message = "the platform does not know the job any more: it was lost, or its result has expired"
                return cls.error("job_expired", message, retryable=True, job=job)
            case {"status": "COMPLETED"}:
                return cls._of_output(job, document.get("output"))
            case {"status": "FAILED"}:
                return cls._of_error(job, str(document.get("error", "")))
            case {"status": "TIMED_OUT"}:
                message = f"the job timed out: {document.get('error', 'the platform gives no reason')}"
                return cls.error("job_timed_out", message, retryable=True, job=job)
        return cls.error("job_cancelled", "the job was cancelled", retryable=False, job=job)

    @classmethod
    def _of_output(cls, job: str, output: Any) -> Self:
        # A handler's outputs are a list, in which a request that does not stream has one.
        value = output[0] if isinstance(output, list) and len(output) == 1 else output
        body = _json_or_text(value) if isinstance(value, str) else value
        if body in (None, [], ""):
            return cls.error("no_output", "the job completed without an output", retryable=False, job=job)
        status = _error_status(body)  # worker-vllm completes a job whose output is an error body
        return cls(status or HTTPStatus.OK, body, retryable=status in _RETRYABLE_STATUSES, job=job)

    @classmethod
    def _of_error(cls, job: str, text: str) -> Self:
        document = _json_or_text(text)
        if not isinstance(document, dict) or not isinstance(document.get("error"), dict):
            # The platform's own, as of a job whose workers were lost; or an exception, as the SDK reports it.
            message = document.get("error_message", text) if isinstance(document, dict) else text
            return cls.error("job_failed", str(message), retryable=True, job=job)
        given = document.get("status")
        status = given if _is_error_status(given) else _error_status(document) or HTTPStatus.INTERNAL_SERVER_ERROR
        retryable = document.get("retryable", status in _RETRYABLE_STATUSES) is True
        body = {name: value for name, value in document.items() if name not in ("status", "retryable")}
        return cls(status, body, retryable=retryable, job=job)

    def document(self, custom_id: str) -> dict[str, Any]:
        """Return the line of the output file or of the errors file."""
        response = {"status_code": self.status, "request_id": self.job, "body": self.body}
        return {
            "id": f"batch_req_{self.job or uuid.uuid4()}",
            "custom_id": custom_id,
            "response": None if self.status is None else response,
            "error": {"code": self.code, "message": self.body} if self.status is None else None,
        }


def result_link(document: dict[str, Any]) -> str | None:
    """Return the link to a result that the worker has stored in a bucket; None if the result is in the document.

    Such a job's only output is `{"output_url", "size_bytes", "expires_at"}`.
    """
    output = document.get("output")
    link = output[0] if isinstance(output, list) and len(output) == 1 else output
    if isinstance(link, dict) and link.keys() == {"output_url", "size_bytes", "expires_at"}:
        return str(link["output_url"])
    return None


def _error_status(body: Any) -> int | None:
    """Return the status of an error body; None for any other body."""
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if _is_error_status(code) else None


def _is_error_status(value: Any) -> bool:
    return isinstance(value, int) and HTTPStatus.BAD_REQUEST <= value < 600  # noqa: PLR2004 (the last status)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
