"""Delivers one task's answer to Spirit, exactly one: a handler's result, or the answer to a proxied request.

    executing ──▶ answer ──▶ metric: succeed or failed ──▶ ack

The acknowledgement comes only after the answer: the agent deletes the task then. A task whose answer could not be
delivered is not acknowledged, so that the platform may give it to another worker.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

from engine.errors import (
    DeliveryError,
    EngineError,
    InternalError,
    JobError,
    RefusedDeliveryError,
    TooLargeError,
    safe_str,
)
from engine.jobs.proxied import AnswerStart
from engine.json_codec import encode
from engine.queue.delivery import MIN_RESULT_TIMEOUT_S
from engine.queue.spirit_agent import ConnectionLostError, SpiritAgent, until_delivered
from engine.queue.spirit_task import SpiritTask

# API.md of spirit-gpu 0.1.0: a larger result can be had by webhook only.
MAX_RESULT_BYTES = {"sync": 10 * 1024 * 1024, "async": 2 * 1024 * 1024}
# A webhook is the client's: while it fails, the task does not end, and no longer than this.
WEBHOOK_TIMEOUT_S = 60.0
_METRIC_TIMEOUT_S = 5.0
# An answer whose connection ends sooner may not have reached its client at all.
EARLY_S = 0.25
_EVENT_STREAM = "text/event-stream"
_DONE = b"data: [DONE]\n\n"

_log = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """Nobody reads the answer any more.

    Attributes:
        after_s: how long after the answer had begun, in seconds.
    """

    def __init__(self, after_s: float) -> None:
        super().__init__(f"the client has gone, {after_s:.3f} s after its answer had begun")
        self.after_s = after_s


class _TaskDelivery:
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
        try:
            await self._until_delivered(lambda: self._agent.call("request-ack", self._task.id, b""))
        except (DeliveryError, RefusedDeliveryError) as failure:
            _log.error("Job %s: it could not be acknowledged (%s)", self._task.id, failure)

    async def _report(self, status: str, message: str) -> None:
        until = time.monotonic() + _METRIC_TIMEOUT_S
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


class HandlerDelivery(_TaskDelivery):
    """Delivers the outputs of a handler's task as one document: to the agent, and to the client's webhook."""

    def __init__(self, agent: SpiritAgent, task: SpiritTask, deadline: float, time_limit_s: float | None) -> None:
        super().__init__(agent, task, deadline, time_limit_s)
        self._outputs: list[Any] = []

    async def stream(self, output: Any) -> None:
        """Keep an output: this kind of task has no stream."""
        self._outputs.append(output)
        self.delivered_count += 1

    async def finish(self, error: JobError | None = None, *, replace_worker: bool = False) -> str:
        """Post the result, then report and acknowledge the task; return the outcome."""
        del replace_worker
        self._deadline = max(self._deadline, time.monotonic() + MIN_RESULT_TIMEOUT_S)
        status, body = (int(HTTPStatus.OK), encode(_joined(self._outputs))) if error is None else _error(error)
        webhook = asyncio.ensure_future(self._call_webhook(status, body))
        try:
            await self._post_result(status, body, "" if error is None else _message(error))
            webhook_failure = await webhook
        except (DeliveryError, RefusedDeliveryError) as failure:
            return await self._give_up(failure)
        finally:
            webhook.cancel()
        await self._end(webhook_failure if error is None else _message(error))
        return "completed" if error is None else "failed"

    async def stopped(self) -> None:
        """Acknowledge a task that was stopped."""
        await self._end("stopped")

    async def _post_result(self, status: int, body: bytes, message: str) -> None:
        limit = MAX_RESULT_BYTES["async" if self._task.is_async else "sync"]
        if len(body) > limit:
            too_large = TooLargeError("result", len(body), limit)
            (status, body), message = _error(too_large), f"{too_large}, or name a webhook"
        result = {"statusCode": status, "message": message, "data": base64.b64encode(body).decode()}
        encoded = encode(result)
        await self._until_delivered(lambda: self._agent.call("request-result", self._task.id, encoded))

    async def _call_webhook(self, status: int, body: bytes) -> str:
        """Post the result to the webhook, if there is one; return what went wrong, if anything."""
        url, until = self._task.webhook, time.monotonic() + WEBHOOK_TIMEOUT_S
        if not url:
            return ""
        try:
            await until_delivered(lambda: self._agent.webhook(url, self._task.id, status, body), lambda: until)
        except (DeliveryError, RefusedDeliveryError) as failure:
            _log.warning("Job %s: its webhook failed (%s)", self._task.id, failure)
            return f"the webhook failed: {failure}"
        return ""


class AnswerBody:
    """The body of an answer, as it grows; each attempt to post it reads it from its start."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._changed = asyncio.Event()
        self.is_complete = False

    def append(self, data: bytes) -> None:
        """Add bytes to the end."""
        self._data += data
        self._changed.set()

    def complete(self) -> None:
        """End the body."""
        self.is_complete = True
        self._changed.set()

    def ends_with(self, end: bytes) -> bool:
        """Return whether these are the last bytes so far."""
        return self._data.endswith(end)

    def __bytes__(self) -> bytes:
        """Return all bytes so far."""
        return bytes(self._data)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body until it is complete; each chunk is all that has come since the last one.

        The first one is empty: with it aiohttp sends the headers, which it would else keep until there is a body.
        """
        position = 0
        yield b""
        while True:
            if position < len(self._data):
                chunk = bytes(self._data[position:])
                position += len(chunk)
                yield chunk
            elif self.is_complete:
                return
            else:
                self._changed.clear()
                await self._changed.wait()


class ProxiedDelivery(_TaskDelivery):
    """Delivers the answer to a proxied request: one POST, whose body is the answer's, a stream as it comes.

    The agent tells that a client has gone by ending that POST, or by answering before its end (README.md of spirit-gpu
    does not say which). A stream that the agent refuses with an error status is posted again from its start.

    Args:
        on_client_gone: is called with the task's id when the job should stop, as nobody reads its stream any more.
    """

    def __init__(
        self,
        agent: SpiritAgent,
        task: SpiritTask,
        deadline: float,
        time_limit_s: float | None,
        on_client_gone: Callable[[str], None],
    ) -> None:
        super().__init__(agent, task, deadline, time_limit_s)
        self._on_client_gone = on_client_gone
        self._start: AnswerStart | None = None
        self._body = AnswerBody()
        self._posting: asyncio.Task[None] | None = None

    async def stream(self, output: AnswerStart | bytes) -> None:
        """Deliver the start of the answer, or bytes of its body; without waiting until they have arrived.

        The POST of a stream begins with its start, so that a client that leaves before the first event is noticed.
        """
        if not isinstance(output, AnswerStart):
            self._body.append(output)
            self.delivered_count += 1
            return
        self._start = output
        if output.content_type.startswith(_EVENT_STREAM):
            self._posting = asyncio.create_task(self._post(output), name=f"answer {self._task.id}")
            self._posting.add_done_callback(self._posting_ended)

    async def finish(self, error: JobError | None = None, *, replace_worker: bool = False) -> str:
        """End the answer, then report and acknowledge the task; return the outcome.

        An error ends a stream that has begun as vLLM's own would: with an event that says so.
        """
        del replace_worker
        self._deadline = max(self._deadline, time.monotonic() + MIN_RESULT_TIMEOUT_S)
        if self._posting is None:
            self._posting = asyncio.create_task(self._post_at_once(error))
        else:
            if error is not None and not self._body.ends_with(_DONE):
                self._body.append(b"data: %b\n\n%b" % (_error(error)[1], _DONE))
            self._body.complete()
        try:
            await self._posting
        except ClientGoneError:
            await self.stopped()
            return "stopped"
        except (DeliveryError, RefusedDeliveryError) as failure:
            return await self._give_up(failure)
        status = self._start.status if self._start is not None else HTTPStatus.INTERNAL_SERVER_ERROR
        has_failed = status >= HTTPStatus.BAD_REQUEST
        await self._end(_message(error) if error else f"answered with status {status}" if has_failed else "")
        return "failed" if error or has_failed else "completed"

    async def stopped(self) -> None:
        """Acknowledge a request whose client has gone.

        If the connection ended just as the answer began, the client may be there and have nothing: it gets an error.
        """
        failure: BaseException | None = None
        if self._posting is not None:
            self._posting.cancel()
            await asyncio.wait({self._posting})
            failure = None if self._posting.cancelled() else self._posting.exception()
        if isinstance(failure, DeliveryError):
            await self._give_up(failure)
            return
        if isinstance(failure, ClientGoneError) and failure.after_s < EARLY_S:
            try:
                await self._post_error(EngineError("the platform closed the connection of the answer; try again"))
            except (DeliveryError, RefusedDeliveryError) as lost:
                _log.warning("Job %s: the error could not be delivered (%s)", self._task.id, lost)
        await self._end("the client has gone" if failure is None else safe_str(failure))

    async def _post(self, start: AnswerStart) -> None:
        """Post the body as it grows.

        Raises:
            ClientGoneError: nobody reads it any more.
            DeliveryError, RefusedDeliveryError: it could not be delivered.
        """

        async def attempt() -> None:
            begun = time.monotonic()
            try:
                await self._agent.answer(self._task.id, start.status, start.content_type, self._body.chunks())
            except ConnectionLostError:
                if self._body.is_complete:  # There is nothing to abort any more: another attempt costs little.
                    raise
            if not self._body.is_complete:
                raise ClientGoneError(time.monotonic() - begun)

        await self._until_delivered(attempt)

    async def _post_at_once(self, error: JobError | None) -> None:
        if error is not None or self._start is None:
            await self._post_error(error or InternalError("the worker has no answer; see its log"))
            return
        start, body = self._start, bytes(self._body)
        await self._until_delivered(lambda: self._agent.answer(self._task.id, start.status, start.content_type, body))

    async def _post_error(self, error: JobError) -> None:
        status, body = _error(error)
        await self._until_delivered(lambda: self._agent.answer(self._task.id, status, "application/json", body))

    def _posting_ended(self, posting: asyncio.Task[None]) -> None:
        if not posting.cancelled() and posting.exception() is not None:
            self._on_client_gone(self._task.id)


def _joined(outputs: list[Any]) -> Any:
    """Return a job's outputs as one document: the only one, the text of a stream, or a list."""
    if len(outputs) == 1:
        return outputs[0]
    return "".join(outputs) if outputs and all(isinstance(output, str) for output in outputs) else outputs


def _error(error: JobError) -> tuple[int, bytes]:
    """Return the status and the body of an error, as a client of an HTTP server gets them."""
    text = error.output()["error"]
    try:
        status = json.loads(text)["status"]
    except (LookupError, TypeError, ValueError):  # A handler's own words.
        status = None
    if not isinstance(status, int):
        status, text = int(HTTPStatus.INTERNAL_SERVER_ERROR), json.dumps(InternalError(text).document())
    return status, text.encode(errors="replace")


def _message(error: JobError) -> str:
    """Return the message of an error."""
    try:
        return str(json.loads(_error(error)[1])["error"]["message"])
    except (LookupError, TypeError):
        return str(error)
