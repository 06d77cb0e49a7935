"""Reads a task of Spirit's agent as a job: a client's JSON for a handler, or a client's whole HTTP request.

A task is `{"headers": {name: text}, "body": base64}`. The SDK parses it, but fails at a number that is none, and gives
no answer to a body that it cannot read; here, each task that has an id becomes a job, so that it is answered.
Source: `task.py`, `handler.py` and `proxy.py` of spirit-gpu 0.1.0.
"""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import Any

from engine.jobs.inputs import ExpiredInput, UnreadableInput
from engine.jobs.proxied import ProxiedRequest
from engine.json_codec import decode

_NUMBERS = ("Ease-Enqueue-At", "Ease-Create-At", "Ease-Time-To-Live")
_ASYNC = "async"


@dataclass(frozen=True)
class SpiritTask:
    """A task.

    Attributes:
        header: the SDK's `MsgHeader`.
        input: of the job.
        is_proxied: whether it is an HTTP request, which is answered as such.
        webhook: URL that the worker posts the result to; empty for none.
        taken_at_ms: when it was taken, in milliseconds since 1970.
    """

    header: Any
    input: Any
    is_proxied: bool
    webhook: str
    taken_at_ms: int

    @property
    def id(self) -> str:
        """The platform's id; empty if it has given none."""
        return str(self.header.request_id)

    @property
    def is_async(self) -> bool:
        """Whether no client waits for the answer."""
        return bool(self.header.mode == _ASYNC)

    def metric(self, status: str, message: str) -> bytes:
        """Return what the agent is told of the task's state, as the SDK words it.

        Args:
            status: "executing", "succeed" or "failed".
            message: why.
        """
        from spirit_gpu.task import getStatus

        now, enqueued = now_ms(), self.header.enqueue_at or self.taken_at_ms
        has_ended = status != "executing"
        document: str = getStatus(
            header=self.header,
            ts=now,
            webhook=self.webhook if has_ended else "",
            status=status,
            queueDur=max(self.taken_at_ms - enqueued, 0),
            execDur=now - self.taken_at_ms if has_ended else 0,
            totalDur=max(now - enqueued, 0) if has_ended else 0,
            msg=message,
        ).json()
        return document.encode()


def now_ms() -> int:
    """Return the time in milliseconds since 1970, as the platform counts it."""
    return round(time.time() * 1000)


def read_task(document: dict[str, Any]) -> SpiritTask:
    """Return the task that an agent has given out; whatever is wrong with it, its job's input says so."""
    from spirit_gpu.task import Task

    headers = _headers(document.get("headers"))
    try:
        task = Task.parse({"headers": headers, "body": document.get("body", "")})
    except (TypeError, ValueError):
        task = Task.parse({"headers": headers, "body": ""})
        value, is_proxied, webhook = _unreadable(task, "its body is not base64")
    else:
        value, is_proxied, webhook = _read_body(task)
    now, header = now_ms(), task.header
    # A task without its time is not known to have expired.
    if header.enqueue_at and now - header.enqueue_at > header.ttl:
        waited_s, ttl_s = (now - header.enqueue_at) / 1000, header.ttl / 1000
        value = ExpiredInput(f"the request waited {waited_s:.1f} s for a worker, and may wait {ttl_s:g} s")
    return SpiritTask(header, value, is_proxied, webhook, now)


def _headers(headers: Any) -> dict[str, str]:
    """Return the headers that are usable, by name: the SDK has defaults for those that are missing."""
    given = headers if isinstance(headers, dict) else {}
    texts = {str(name): value if isinstance(value, str) else str(value) for name, value in given.items()}
    return {name: text for name, text in texts.items() if name not in _NUMBERS or _is_number(text)}


def _is_number(text: str) -> bool:
    try:
        return int(text.partition(",")[0]) >= 0
    except ValueError:
        return False


def _read_body(task: Any) -> tuple[Any, bool, str]:
    """Return the job's input, whether it is a proxied request, and the webhook."""
    try:
        document = decode(task.data)
    except (ValueError, RecursionError):
        return _unreadable(task, "its body is not JSON")
    if not isinstance(document, dict):
        return _unreadable(task, "its body is not a JSON object")
    if "input" in document:
        webhook = document.get("webhook") if task.header.mode == _ASYNC else task.header.webhook
        return document["input"], False, webhook if isinstance(webhook, str) else ""
    method, uri = document.get("method"), document.get("uri")
    if not isinstance(method, str) or not isinstance(uri, str):
        return _unreadable(task, "its body has neither `input` nor `method` and `uri`")
    try:
        body = base64.b64decode(document.get("body") or "", validate=True)
    except (TypeError, ValueError):
        return UnreadableInput("the body of the request is not base64"), True, ""
    return ProxiedRequest.of(method, uri, body, _content_type(document.get("header"))), True, ""


def _content_type(header: Any) -> str:
    """Return the client's header `Content-Type`, of which the agent gives a list of values; empty if there is none."""
    fields = header if isinstance(header, dict) else {}
    values = next((values for name, values in fields.items() if str(name).lower() == "content-type"), None)
    value = values[0] if isinstance(values, list) and values else values
    return value if isinstance(value, str) and value.isascii() and value.isprintable() else ""


def _unreadable(task: Any, why: str) -> tuple[Any, bool, str]:
    """Return the same for a task that cannot be read: one without a webhook is answered as a proxied request.

    A client that waits gets that answer, whichever kind its request was: with a status, where a result would hold it.
    """
    is_proxied = task.header.mode != _ASYNC and not task.header.webhook
    return UnreadableInput(f"the platform's task {task.header.request_id}: {why}"), is_proxied, task.header.webhook
