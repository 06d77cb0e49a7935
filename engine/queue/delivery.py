"""Delivers a job's outputs and its result to the platform: in order, within its size limits, until they arrive."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from engine.errors import (
    BucketError,
    BucketUnavailableError,
    DeliveryError,
    JobError,
    RefusedDeliveryError,
    RefusedOutputError,
    TooLargeError,
)
from engine.jobs.event_batcher import MAX_OUTPUT_BYTES
from engine.json_codec import encode
from engine.queue.bucket import Bucket
from engine.queue.protocol import MAX_RESULT_BYTES, PostKind
from engine.run_clock import CLOCK
from engine.telemetry.counters import COUNTERS

# A result is tried for at least as long, however late the job is: without one, its client waits in vain. So is a post
# that the platform refuses for a reason that may pass.
MIN_RESULT_TIMEOUT_S = 10.0
# Refusals that may pass: a key that is being replaced, a gateway in the way. For a result, a conflict as well: another
# delivery of the job may be under way.
_PASSING_REFUSALS = {
    PostKind.OUTPUT: {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN},
    PostKind.RESULT: {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.CONFLICT},
}
_FIRST_WAIT_S = 0.1
_MAX_WAIT_S = 5.0
# Between two uploads, each of which has made several attempts.
_FIRST_BUCKET_WAIT_S = 2.0
_MAX_BUCKET_WAIT_S = 30.0

_log = logging.getLogger(__name__)

Post = Callable[[PostKind, str, bytes], Awaitable[None]]


class JobDelivery:
    """Delivers one job.

    An output whose response is lost is sent again: nothing in the protocol says whether it had arrived. So each output
    arrives at least once.

    Args:
        post: delivers one body, in one attempt.
        job_id: the job's.
        deadline: when the job's time is over, by `engine.run_clock`; deliveries are tried until then.
        bucket: where a result goes that is too large for the platform, if there is one.

    Attributes:
        delivered_count: how many outputs have arrived.
    """

    time_limit_s: float | None = None

    def __init__(self, post: Post, job_id: str, deadline: float, bucket: Bucket | None = None) -> None:
        self._post = post
        self._job_id = job_id
        self._deadline = deadline
        self._bucket = bucket
        self._outputs: list[msgspec.Raw] = []
        self._begun_at = CLOCK.now()
        self._finishing_until: float | None = None
        self.delivered_count = 0

    async def stream(self, output: Any) -> None:
        """Deliver an output of the stream. One above the platform's limit arrives with the result only.

        Raises:
            TooLargeError, RefusedOutputError: the platform refuses it; the job ends with this error.
            DeliveryError: it did not arrive in time.
        """
        encoded = encode(output)
        self._outputs.append(msgspec.Raw(encoded))
        body = b'{"output":%b}' % encoded
        if len(body) > MAX_OUTPUT_BYTES:
            _log.warning("Job %s: an output of %d bytes exceeds the limit of a stream", self._job_id, len(body))
            return
        try:
            await self._deliver(PostKind.OUTPUT, body, self._deadline)
        except RefusedDeliveryError as refusal:
            COUNTERS.refused += 1
            _log.error("Job %s: the platform refused an output (%s)", self._job_id, refusal)
            raise _error_for_refusal("output", len(body), refusal) from None
        self.delivered_count += 1

    async def finish(self, error: JobError | None = None, *, replace_worker: bool = False) -> str:
        """Deliver the result: all outputs, or the error. What cannot be delivered is logged.

        A result that is too large is replaced by a link to it, if there is a bucket. Else, or if it is refused, it is
        replaced by an error that says how large it was; not if the worker was frozen meanwhile, as the platform may
        have given the job out again.

        Args:
            error: why the job failed.
            replace_worker: ask the platform to replace this worker.

        Returns:
            The outcome of the job: "completed", "failed", or "undelivered".
        """
        if self._finishing_until is None:
            self._finishing_until = CLOCK.now() + MIN_RESULT_TIMEOUT_S
        result: dict[str, Any] = {"output": self._outputs} if error is None else error.output()
        if replace_worker:
            result["stopPod"] = True
        body = encode(result)
        if len(body) > MAX_RESULT_BYTES and not isinstance(error, TooLargeError):
            too_large = TooLargeError("result", len(body), MAX_RESULT_BYTES)
            failure = await self._store_outputs(too_large) if error is None else too_large
            return await self.finish(failure, replace_worker=replace_worker)
        try:
            await self._deliver(PostKind.RESULT, body, max(self._deadline, self._finishing_until))
        except RefusedDeliveryError as refusal:
            COUNTERS.refused += 1
            _log.error("Job %s: the platform refused the result (%s)", self._job_id, refusal)
            if error is not None or _was_taken_back(refusal, self._begun_at):
                return "undelivered"
            reason = await self._store_outputs(_error_for_refusal("result", len(body), refusal))
            return await self.finish(reason, replace_worker=replace_worker)
        except DeliveryError as failure:
            _log.error("Job %s: the result could not be delivered (%s)", self._job_id, failure)
            return "undelivered"
        return "completed" if error is None else "failed"

    async def _store_outputs(self, refusal: JobError) -> JobError | None:
        """Replace outputs that are too large by a link to them, or return what the job fails with."""
        if self._bucket is None or not isinstance(refusal, TooLargeError):
            return refusal
        bucket, self._bucket = self._bucket, None  # Once: a link is never too large.
        try:
            link = await self._upload(bucket, encode(self._outputs))
        except BucketError as failure:
            return failure
        finally:  # However long the upload took.
            self._finishing_until = None
        self._outputs = [msgspec.Raw(encode(link))]
        return None

    async def _upload(self, bucket: Bucket, outputs: bytes) -> dict[str, Any]:
        """Upload the outputs; a bucket that does not answer is tried for as long as the platform would be.

        Raises:
            BucketError: as `Bucket.store`.
        """
        until = max(self._deadline, CLOCK.now() + MIN_RESULT_TIMEOUT_S)
        wait_s = _FIRST_BUCKET_WAIT_S
        while True:
            try:
                return await bucket.store(self._job_id, outputs)
            except BucketUnavailableError as failure:
                task = asyncio.current_task()
                is_cancelled = task is not None and task.cancelling() > 0  # There is time left to say so.
                if is_cancelled or CLOCK.now() + wait_s > until:
                    raise
                try:
                    await asyncio.sleep(wait_s)
                except asyncio.CancelledError:
                    raise failure from None
                wait_s = min(2 * wait_s, _MAX_BUCKET_WAIT_S)

    async def stopped(self) -> None:
        """Deliver nothing: the platform, which has stopped the job, wants no result."""

    async def _deliver(self, kind: PostKind, body: bytes, until: float) -> None:
        try:
            await self._post(kind, self._job_id, body)
        except (DeliveryError, RefusedDeliveryError) as failure:
            await self._retry(kind, body, until, failure)

    async def _retry(self, kind: PostKind, body: bytes, until: float, failure: Exception) -> None:
        """Deliver in further attempts, if another may succeed; raise the last failure if none does."""
        refused_until = self._finishing_until or CLOCK.now() + MIN_RESULT_TIMEOUT_S

        def should_retry(failure: BaseException) -> bool:
            if not isinstance(failure, RefusedDeliveryError):
                return isinstance(failure, DeliveryError)
            return failure.status in _PASSING_REFUSALS[kind] and CLOCK.now() < refused_until

        if not should_retry(failure) or CLOCK.now() >= until:
            raise failure
        first_wait_s = random.uniform(0, _FIRST_WAIT_S)  # noqa: S311 (jitter)
        await asyncio.sleep(min(first_wait_s, max(until - CLOCK.now(), 0)))
        backoff = wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_MAX_WAIT_S)
        attempts = AsyncRetrying(
            stop=lambda _: CLOCK.now() >= until,
            wait=lambda state: min(backoff(state), max(until - CLOCK.now(), 0)),
            retry=retry_if_exception(should_retry),
            reraise=True,
        )
        await attempts(self._attempt_again, kind, body)

    async def _attempt_again(self, kind: PostKind, body: bytes) -> None:
        COUNTERS.retries += 1
        await self._post(kind, self._job_id, body)


def _was_taken_back(refusal: RefusedDeliveryError, begun_at: float) -> bool:
    """Return whether the job may have been given out again: the error of this run would then end the other one."""
    return refusal.status != HTTPStatus.REQUEST_ENTITY_TOO_LARGE and CLOCK.was_frozen_since(begun_at)


def _error_for_refusal(what: str, size_bytes: int, refusal: RefusedDeliveryError) -> JobError:
    """Return the error that a job ends with when the platform refuses an output or the result."""
    if refusal.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return TooLargeError(what, size_bytes)
    return RefusedOutputError(what, size_bytes, str(refusal))
