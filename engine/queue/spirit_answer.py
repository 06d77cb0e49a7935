"""Delivers the answer to a proxied request to Spirit, a stream as it comes, and notices a client that leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus

from engine.errors import DeliveryError, EngineError, InternalError, JobError, RefusedDeliveryError, safe_str
from engine.jobs.proxied import AnswerStart
from engine.queue.spirit_agent import ConnectionLostError, SpiritAgent
from engine.queue.spirit_delivery import TaskDelivery, error_answer, message_of
from engine.queue.spirit_task import SpiritTask
from engine.run_clock import CLOCK

# An answer whose connection ends sooner may not have reached its client at all.
EARLY_S = 0.25
# A complete answer is tried for so long, as its client waits: an agent that is away, and a client that has gone, look
# the same by then.
ANSWER_TIMEOUT_S = 30.0
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


class ProxiedDelivery(TaskDelivery):
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
        self._deadline = CLOCK.now() + ANSWER_TIMEOUT_S
        if self._posting is None:
            self._posting = asyncio.create_task(self._post_at_once(error))
        else:
            if error is not None and not self._body.ends_with(_DONE):
                self._body.append(b"data: %b\n\n%b" % (error_answer(error)[1], _DONE))
            self._body.complete()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._posting
        except ClientGoneError:
            await self.stopped()
            return "stopped"
        except TimeoutError:
            return await self._give_up(DeliveryError("no answer in time"))
        except (DeliveryError, RefusedDeliveryError) as failure:
            return await self._give_up(failure)
        status = self._start.status if self._start is not None else HTTPStatus.INTERNAL_SERVER_ERROR
        has_failed = status >= HTTPStatus.BAD_REQUEST
        await self._end(message_of(error) if error else f"answered with status {status}" if has_failed else "")
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
            begun = CLOCK.now()
            try:
                await self._agent.answer(self._task.id, start.status, start.content_type, self._body.chunks())
            except ConnectionLostError:
                if self._body.is_complete:  # There is nothing to abort any more: another attempt costs little.
                    raise
            if not self._body.is_complete:
                raise ClientGoneError(CLOCK.now() - begun)

        await self._until_delivered(attempt)

    async def _post_at_once(self, error: JobError | None) -> None:
        if error is not None or self._start is None:
            await self._post_error(error or InternalError("the worker has no answer; see its log"))
            return
        start, body = self._start, bytes(self._body)
        await self._until_delivered(lambda: self._agent.answer(self._task.id, start.status, start.content_type, body))

    async def _post_error(self, error: JobError) -> None:
        status, body = error_answer(error)
        await self._until_delivered(lambda: self._agent.answer(self._task.id, status, "application/json", body))

    def _posting_ended(self, posting: asyncio.Task[None]) -> None:
        if not posting.cancelled() and posting.exception() is not None:
            self._on_client_gone(self._task.id)
