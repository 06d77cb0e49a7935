"""A job's outputs and its result on their way to the platform: in order, sized before, tried until they arrive."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from engine.errors import DeliveryError, JobError, RefusedDeliveryError, RefusedOutputError, TooLargeError
from engine.jobs.event_batcher import MAX_OUTPUT_BYTES
from engine.json_codec import encode
from engine.queue.runpod_client import Delivery

# The documented limit of what a client gets at once (20 MB).
MAX_RESULT_BYTES = 20_000_000
# A result is tried for so long, however late the job is: without one, its client waits for nothing.
LEAST_RESULT_S = 10.0
# Refusals that may pass: a key that is being replaced, a gateway in the way. For a result, a conflict as well: another
# delivery of the job may be under way. Each is tried again for `LEAST_RESULT_S`.
_PASSING_REFUSALS = {
    Delivery.STREAM: {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN},
    Delivery.RESULT: {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.CONFLICT},
}
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
            TooLargeError, RefusedOutputError: the platform does not take it; the job ends with this error.
            DeliveryError: it did not arrive in time.
        """
        encoded = encode(output)
        self._outputs.append(msgspec.Raw(encoded))
        body = b'{"output":%b}' % encoded
        if len(body) > MAX_OUTPUT_BYTES:
            _log.warning("Job %s: an output of %d bytes is above the stream's cap", self._job_id, len(body))
            return
        try:
            await self._deliver(Delivery.STREAM, body, self._deadline)
        except RefusedDeliveryError as refusal:
            _log.error("Job %s: the platform refused an output (%s)", self._job_id, refusal)
            raise _refused("output", len(body), refusal) from None
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
            too_large = TooLargeError("result", len(body), MAX_RESULT_BYTES)
            return await self.finish(too_large, replace_worker=replace_worker)
        try:
            await self._deliver(Delivery.RESULT, body, max(self._deadline, self._finishing_until))
        except RefusedDeliveryError as refusal:
            _log.error("Job %s: the platform refuses its result (%s)", self._job_id, refusal)
            if error is not None:
                return "undelivered"
            return await self.finish(_refused("result", len(body), refusal), replace_worker=replace_worker)
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
        refused_until = self._finishing_until or time.monotonic() + LEAST_RESULT_S
        failures = [failure]

        async def post() -> None:
            if failures:
                raise failures.pop()
            await self._post(kind, self._job_id, body)

        def may_pass(failure: BaseException) -> bool:
            return self._may_pass(kind, failure) and (
                isinstance(failure, DeliveryError) or time.monotonic() < refused_until
            )

        pause = wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)
        attempts = AsyncRetrying(
            stop=lambda _: time.monotonic() >= until,
            wait=lambda state: min(pause(state), max(until - time.monotonic(), 0)),
            retry=retry_if_exception(may_pass),
            reraise=True,
        )
        await attempts(post)

    @staticmethod
    def _may_pass(kind: Delivery, failure: BaseException) -> bool:
        """Whether another try may succeed."""
        if isinstance(failure, RefusedDeliveryError):
            return failure.status in _PASSING_REFUSALS[kind]
        return isinstance(failure, DeliveryError)


def _refused(what: str, size_bytes: int, refusal: RefusedDeliveryError) -> JobError:
    """Return the error that a job ends with when its output or result was refused."""
    if refusal.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return TooLargeError(what, size_bytes)
    return RefusedOutputError(what, size_bytes, str(refusal))
