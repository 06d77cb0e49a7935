"""Delivers one task's answer to Spirit, exactly one; here, that of a handler's task.

    executing ──▶ answer ──▶ metric: succeed or failed ──▶ ack

The acknowledgement comes only after the answer: the agent deletes the task then. A task whose answer could not be
delivered is not acknowledged, so that the platform may give it to another worker.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from engine.errors import (
    BucketError,
    DeliveryError,
    InternalError,
    JobError,
    RefusedDeliveryError,
    TooLargeError,
)
from engine.json_codec import encode
from engine.queue.bucket import Bucket
from engine.queue.delivery import MIN_RESULT_TIMEOUT_S
from engine.queue.spirit_agent import SpiritAgent, until_delivered
from engine.queue.spirit_task import SpiritTask
from engine.run_clock import CLOCK

# API.md of spirit-gpu 0.1.0: a larger result can be had by webhook only.
MAX_RESULT_BYTES = {"sync": 10 * 1024 * 1024, "async": 2 * 1024 * 1024}
# A webhook is the client's: while it fails, the task does not end, and no longer than this.
WEBHOOK_TIMEOUT_S = 60.0
_METRIC_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


class TaskDelivery:
    """What both kinds of task have in common: metrics and the acknowledgement."""

    def __init__(self, agent: SpiritAgent, task: SpiritTask, deadline: float, time_limit_s: float | None) -> None:
        self._agent = agent
        self._task = task
        self._deadline = deadline
        self.time_limit_s = time_limit_s
        self.delivered_count = 0
        self.on_answered: Callable[[], None] = lambda: None
        """Is called when the answer has arrived, or nobody wants it any more."""
        self._executing = agent.run_in_background(self._report("executing", "start executing"))

    def _until(self) -> float:
        return self._deadline

    async def _until_delivered(self, attempt: Callable[[], Awaitable[None]]) -> None:
        await until_delivered(attempt, self._until)

    async def _end(self, error: str = "") -> None:
        """Report how the task has ended, and acknowledge it.

        Args:
            error: why it has failed; empty if it has not.
        """
        self.on_answered()
        await self._executing
        await self._report("failed" if error else "succeed", error or "succeed")
        until = CLOCK.now() + MIN_RESULT_TIMEOUT_S
        try:
            await until_delivered(lambda: self._agent.call("request-ack", self._task.id, b""), lambda: until)
        except (DeliveryError, RefusedDeliveryError) as failure:
            _log.error("Job %s: it could not be acknowledged (%s)", self._task.id, failure)

    async def _report(self, status: str, message: str) -> None:
        until = CLOCK.now() + _METRIC_TIMEOUT_S
        body = self._task.metric(status, message)
        try:
            await until_delivered(lambda: self._agent.call("request-metric", self._task.id, body), lambda: until)
        except (DeliveryError, RefusedDeliveryError) as failure:
            _log.warning("Job %s: its state %r could not be reported (%s)", self._task.id, status, failure)

    async def _give_up(self, failure: Exception) -> str:
        """End a task whose answer could not be delivered."""
        _log.error("Job %s: the answer could not be delivered (%s)", self._task.id, failure)
        if isinstance(failure, RefusedDeliveryError):  # Another worker's would be refused, too.
            await self._end(f"the agent refused the answer: {failure}")
        return "undelivered"


class HandlerDelivery(TaskDelivery):
    """Delivers the outputs of a handler's task as one document: to the agent, and to the client's webhook."""

    def __init__(
        self,
        agent: SpiritAgent,
        task: SpiritTask,
        deadline: float,
        time_limit_s: float | None,
        bucket: Bucket | None = None,
    ) -> None:
        super().__init__(agent, task, deadline, time_limit_s)
        self._bucket = bucket
        self._outputs: list[Any] = []

    async def stream(self, output: Any) -> None:
        """Keep an output: this kind of task has no stream."""
        self._outputs.append(output)
        self.delivered_count += 1

    async def finish(self, error: JobError | None = None, *, replace_worker: bool = False) -> str:
        """Post the result, then report and acknowledge the task; return the outcome."""
        del replace_worker
        status, body = (int(HTTPStatus.OK), encode(_joined(self._outputs))) if error is None else error_answer(error)
        webhook = asyncio.ensure_future(self._call_webhook(status, body))
        try:
            await self._post_result(status, body, "" if error is None else message_of(error))
            webhook_failure = await webhook
        except (DeliveryError, RefusedDeliveryError) as failure:
            return await self._give_up(failure)
        finally:
            webhook.cancel()
        await self._end(webhook_failure if error is None else message_of(error))
        return "completed" if error is None else "failed"

    async def stopped(self) -> None:
        """Acknowledge a task that was stopped."""
        await self._end("stopped")

    async def _post_result(self, status: int, body: bytes, message: str) -> None:
        limit = MAX_RESULT_BYTES["async" if self._task.is_async else "sync"]
        if len(body) > limit:
            status, body, message = await self._shortened(status, body, message, limit)
        result = {"statusCode": status, "message": message, "data": base64.b64encode(body).decode()}
        encoded = encode(result)
        self._deadline = max(self._deadline, CLOCK.now() + MIN_RESULT_TIMEOUT_S)
        await self._until_delivered(lambda: self._agent.call("request-result", self._task.id, encoded))

    async def _shortened(self, status: int, body: bytes, message: str, limit: int) -> tuple[int, bytes, str]:
        """Return a link to a result that is too large, if there is a bucket; else an error that says so."""
        error: JobError = TooLargeError("result", len(body), limit)
        if self._bucket is not None and not message:
            try:
                return status, encode(await self._bucket.store(self._task.id, body)), message
            except BucketError as failure:
                error = failure
        return *error_answer(error), f"{error}, or name a webhook"

    async def _call_webhook(self, status: int, body: bytes) -> str:
        """Post the result to the webhook, if there is one; return what went wrong, if anything."""
        url, until = self._task.webhook, CLOCK.now() + WEBHOOK_TIMEOUT_S
        if not url:
            return ""
        try:
            await until_delivered(lambda: self._agent.webhook(url, self._task.id, status, body), lambda: until)
        except (DeliveryError, RefusedDeliveryError) as failure:
            _log.warning("Job %s: its webhook failed (%s)", self._task.id, failure)
            return f"the webhook failed: {failure}"
        return ""


def _joined(outputs: list[Any]) -> Any:
    """Return a job's outputs as one document: the only one, the text of a stream, or a list."""
    if len(outputs) == 1:
        return outputs[0]
    return "".join(outputs) if outputs and all(isinstance(output, str) for output in outputs) else outputs


def error_answer(error: JobError) -> tuple[int, bytes]:
    """Return the status and the body of an error, as a client of an HTTP server gets them."""
    text = error.output()["error"]
    try:
        status = json.loads(text)["status"]
    except (LookupError, TypeError, ValueError):  # A handler's own words.
        status = None
    if not isinstance(status, int):
        status, text = int(HTTPStatus.INTERNAL_SERVER_ERROR), json.dumps(InternalError(text).document())
    return status, text.encode(errors="replace")


def message_of(error: JobError) -> str:
    """Return the message of an error."""
    try:
        return str(json.loads(error_answer(error)[1])["error"]["message"])
    except (LookupError, TypeError):
        return str(error)
