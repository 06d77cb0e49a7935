"""A job's outputs and its result on their way to the platform: in order, sized before, tried until they arrive."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from engine.batching import MAX_OUTPUT_BYTES
from engine.errors import DeliveryError, JobError, RefusedDeliveryError, RefusedResultError, TooLargeError
from engine.platform import Delivery

# The documented limit of what a client gets at once (20 MB).
MAX_RESULT_BYTES = 20_000_000
# A result is tried for so long, however late the job is: without one, its client waits for nothing.
LEAST_RESULT_S = 10.0
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
        self._outputs: list[Any] = []
        self.count = 0

    async def stream(self, output: Any) -> None:
        """Deliver an output of the stream. One that is above the platform's cap comes with the result alone.

        Raises:
            RefusedDeliveryError: the platform does not want it: the job is no longer ours.
            DeliveryError: it did not arrive in time.
        """
        self._outputs.append(output)
        body = _encode({"output": output})
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
        result: dict[str, Any] = {"output": self._outputs} if error is None else error.output()
        if replace_worker:
            result["stopPod"] = True
        body = _encode(result)
        if len(body) > MAX_RESULT_BYTES and not isinstance(error, TooLargeError):
            return await self.finish(TooLargeError(len(body), MAX_RESULT_BYTES), replace_worker=replace_worker)
        try:
            await self._deliver(Delivery.RESULT, body, max(self._deadline, time.monotonic() + LEAST_RESULT_S))
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
        except DeliveryError as failure:
            # Only now: what tries again costs a fifth of a delivery to set up, and hardly any needs it.
            await self._deliver_again(kind, body, until, failure)

    async def _deliver_again(self, kind: Delivery, body: bytes, until: float, failure: DeliveryError) -> None:
        failures = [failure]

        async def post() -> None:
            if failures:
                raise failures.pop()
            await self._post(kind, self._job_id, body)

        pause = wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)
        attempts = AsyncRetrying(
            stop=lambda _: time.monotonic() >= until,
            wait=lambda state: min(pause(state), max(until - time.monotonic(), 0)),
            retry=retry_if_exception_type(DeliveryError),
            reraise=True,
        )
        await attempts(post)


def _instead(size_bytes: int, refusal: RefusedDeliveryError) -> JobError:
    """What a job ends with whose result was refused."""
    if refusal.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return TooLargeError(size_bytes)
    return RefusedResultError(size_bytes, str(refusal))


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode(errors="surrogatepass")
