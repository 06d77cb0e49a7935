"""What a task is: a client's request on its way to a worker, in the form in which an agent gives it out."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from emulator.core.work import Durations

Mode = Literal["sync", "async"]


class TaskStatus(StrEnum):
    """A task's state: the SDK's `Status`, and `queueing` before a worker has said anything."""

    QUEUEING = "queueing"
    EXECUTING = "executing"
    SUCCEED = "succeed"
    FAILED = "failed"


@dataclass(frozen=True)
class Answer:
    """One answer that a worker has posted: to `request-result`, or to `request-proxy`."""

    route: str
    worker: str
    status: int


@dataclass(eq=False)
class Task(Durations):
    """One task, from its submission to the end of its retention. Times are the queue's clock, in seconds.

    Args:
        sequence: its number, with which a client cancels it.
        kind: how it was submitted: `sync`, `async`, or the path of a proxied request.
        body: what the worker reads: the client's JSON, or a proxied request as JSON.
        webhook: that of a sync request; the SDK reads an async request's from the body.
        created_ms: when it was submitted, in milliseconds since 1970.
        ttl_ms: a worker that takes it later drops it.
        retention_s: how long it is kept after its end.
        last_seen_at: when its worker last reported it.
        acked: whether its worker has acknowledged it, which ends it.
        message: the last metric's.
        result: the first answer's data, None without one, for a proxied request, and above the limit.
        result_status: the first answer's status.
        answers: all that were posted; the first is the client's.
        output_count: pieces of a proxied answer.
    """

    id: str
    sequence: int
    mode: Mode
    kind: str
    body: bytes
    webhook: str
    submitted_at: float
    created_ms: int
    ttl_ms: int
    retention_s: float
    queued_at: float
    worker: str | None = None
    taken_at: float | None = None
    last_seen_at: float = 0.0
    first_output_at: float | None = None
    ended_at: float | None = None
    acked: bool = False
    status: TaskStatus = TaskStatus.QUEUEING
    message: str = ""
    result: bytes | None = None
    result_status: int | None = None
    answers: list[Answer] = field(default_factory=list)
    output_count: int = 0
    retries: int = 0

    def platform_document(self) -> dict[str, Any]:
        """Return what only Spirit has: `answers`, the statuses of all that workers have posted."""
        return {"answers": [answer.status for answer in self.answers]}

    def worker_document(self) -> dict[str, Any]:
        """Return the task as an agent gives it out: `{"headers": {name: text}, "body": base64}` (the SDK's `Task`)."""
        headers = {
            "Ease-Mode": self.mode,
            "Ease-Webhook": self.webhook,
            "Ease-Request-Id": self.id,
            "Ease-Enqueue-At": str(self.created_ms),
            "Ease-Create-At": str(self.created_ms),
            "Ease-Status-Subject": f"status.{self.id}",
            "Ease-Time-To-Live": str(self.ttl_ms),
        }
        return {"headers": headers, "body": base64.b64encode(self.body).decode()}

    def status_document(self, serverless_id: str) -> dict[str, Any]:
        """Return the answer to `/status?requestID=`: statusCode 200 without a result means that the task still runs."""
        failed_status = self.result_status if self.result_status not in (None, 200) else 500
        return {
            "statusCode": failed_status if self.status is TaskStatus.FAILED else 200,
            "serverlessID": serverless_id,
            "requestID": self.id,
            "status": self.status.value,
            "message": self.message,
            "result": None if self.result is None else base64.b64encode(self.result).decode(),
        }


def unknown_status_document(serverless_id: str, request_id: str) -> dict[str, Any]:
    """Return the answer for a task whose result is no longer kept, or that never was."""
    return {
        "statusCode": 404,
        "serverlessID": serverless_id,
        "requestID": request_id,
        "status": "",
        "message": "request not found",
        "result": None,
    }


def proxied_body(method: str, uri: str, header: Mapping[str, list[str]], body: bytes) -> bytes:
    """Return a proxied request as the SDK reads it (`proxy.py`, which refuses any other key)."""
    document = {"method": method, "uri": uri, "header": header, "body": base64.b64encode(body).decode()}
    return json.dumps(document).encode()
