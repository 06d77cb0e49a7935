"""A job's outputs and its result on their way to the platform: in order, sized before, tried until they arrive."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import msgspec
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from engine.errors import DeliveryError, JobError, RefusedDeliveryError, RefusedResultError, TooLargeError
from engine.jobs.event_batcher import MAX_OUTPUT_BYTES
from engine.json_codec import encode
from engine.queue.runpod_client import Delivery

# The documented limit of what a client gets at once (20 MB).
MAX_RESULT_BYTES = 20_000_000
# A result is tried for so long, however late the job is: without one, its client waits for nothing.
LEAST_RESULT_S = 10.0
# Refusals of a result that may pass: a key that is being replaced, a gateway in the way. Tried for as long, too.
_DOUBTFUL = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.CONFLICT}
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0

_log = logging.getLogger(__name__)

Post = Callable[[Delivery, str, bytes], Awaitable[None]]


class JobDelivery:
    """Delivers one job.

    An output whose answer is lost is sent again, as nothing in the protocol tells whether it had arrived: each arrives
    at least once.

    Args:
        post: delivers one body, in one try.
        job_id: the job's.
        deadline: when the job's time is over, by `time.monotonic()`; until then a delivery is tried.
    """

    def __init__(self, post: Post, job_id: str, deadline: float) -> None:
        self._post = post
        self._job_id = job_id
        self._deadline = deadline
        self._outputs: list[msgspec.Raw] = []
        self._finishing_until: float | None = None
        self.count = 0

    async def stream(self, output: Any) -> None:
        """Deliver an output of the stream. One that is above the platform's cap comes with the result alone.

        Raises:
            RefusedDeliveryError: the platform does not want it: the job is no longer ours.
            DeliveryError: it did not arrive in time.
        """
        encoded = encode(output)
        self._outputs.append(msgspec.Raw(encoded))
        body = b'{"output":%b}' % encoded
        if len(body) > MAX_OUTPUT_BYTES:
            _log.warning("Job %s: an output of %d bytes is above the stream's cap", self._job_id, len(body))
            return
        await self._deliver(Delivery.STREAM, body, self._deadline)
        self.count += 1

    async def finish(self, error: JobError | None = None, *, replace_worker: bool = False) -> str:
        """Deliver the result: all outputs, or the error. What cannot be delivered is in the log.

        A result that is too large, or refused, has an error in its place that says how large it was.

        Args:
            error: why the job failed.
            replace_worker: tell the platform that this worker has to be replaced.

        Returns:
            What has become of the job: "completed", "failed", or "undelivered".
        """
        if self._finishing_until is None:
            self._finishing_until = time.monotonic() + LEAST_RESULT_S
        result: dict[str, Any] = {"output": self._outputs} if error is None else error.output()
        if replace_worker:
            result["stopPod"] = True
        body = encode(result)
        if len(body) > MAX_RESULT_BYTES and not isinstance(error, TooLargeError):
            return await self.finish(TooLargeError(len(body), MAX_RESULT_BYTES), replace_worker=replace_worker)
        try:
            await self._deliver(Delivery.RESULT, body, max(self._deadline, self._finishing_until))
        except RefusedDeliveryError as refusal:
            _log.error("Job %s: the platform refuses its result (%s)", self._job_id, refusal)
            if error is not None:
                return "undelivered"
            return await self.finish(_instead(len(body), refusal), replace_worker=replace_worker)
        except DeliveryError as failure:
            _log.error("Job %s: its result could not be delivered (%s)", self._job_id, failure)
            return "undelivered"
        return "completed" if error is None else "failed"

    async def _deliver(self, kind: Delivery, body: bytes, until: float) -> None:
        try:
            await self._post(kind, self._job_id, body)
        except (DeliveryError, RefusedDeliveryError) as failure:
            if not self._may_pass(kind, failure):
                raise
            # Only now: what tries again costs a fifth of a delivery to set up, and hardly any needs it.
            await self._deliver_again(kind, body, until, failure)

    async def _deliver_again(self, kind: Delivery, body: bytes, until: float, failure: Exception) -> None:
        failures = [failure]

        async def post() -> None:
            if failures:
                raise failures.pop()
            await self._post(kind, self._job_id, body)

        pause = wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)
        attempts = AsyncRetrying(
            stop=lambda _: time.monotonic() >= until,
            wait=lambda state: min(pause(state), max(until - time.monotonic(), 0)),
            retry=retry_if_exception(partial(self._may_pass, kind)),
            reraise=True,
        )
        await attempts(post)

    def _may_pass(self, kind: Delivery, failure: BaseException) -> bool:
        """Whether another try may succeed."""
        if isinstance(failure, RefusedDeliveryError) and kind is Delivery.RESULT:
            return failure.status in _DOUBTFUL and time.monotonic() < (self._finishing_until or 0.0)
        return isinstance(failure, DeliveryError)


def _instead(size_bytes: int, refusal: RefusedDeliveryError) -> JobError:
    """What a job ends with whose result was refused."""
    if refusal.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return TooLargeError(size_bytes)
    return RefusedResultError(size_bytes, str(refusal))
