"""What the job loop needs of a platform's queue. A client of another platform implements `JobQueue`."""

from __future__ import annotations

from enum import Enum
from typing import Any, Protocol

# A take that the platform holds open for longer is given up, as the SDK does.
TAKE_TIMEOUT_S = 90.0
# How long a take may still bring a job after `stop_polling`: as a rule, the platform answers after one round trip.
POLL_CANCEL_GRACE_S = 2.0
# The documented limit of a result (20 MB). That of an output is `engine.jobs.event_batcher.MAX_OUTPUT_BYTES`.
MAX_RESULT_BYTES = 20_000_000


class PostKind(Enum):
    """What is posted for a job: an output of its stream, or its result."""

    OUTPUT = "output"
    RESULT = "result"


class JobQueue(Protocol):
    """A platform's queue, seen from one worker."""

    async def take(self, count: int) -> list[Any]:
        """Return up to `count` jobs; none if none came while the platform held the call open.

        What stands where a job is expected may be anything; the loop checks it.

        It must not be cancelled while the platform may be answering, as a job could be on its way: call `stop_polling`.

        Raises:
            RateLimitedError: the platform asks to wait.
            Exception: the platform cannot be reached; the loop logs it and tries again.
        """

    def stop_polling(self) -> None:
        """Tell the platform that no job is wanted any more, and still receive one that is on its way."""

    async def stop_signals(self) -> list[str]:
        """Return the ids of jobs to stop; none if there were none while the platform held the call open.

        Raises:
            RateLimitedError: the platform asks to wait.
            Exception: the platform cannot be reached; the loop logs it and tries again.
        """

    async def post(self, kind: PostKind, job_id: str, body: bytes) -> None:
        """Deliver a JSON body for a job, in one attempt.

        Raises:
            RefusedDeliveryError: the platform does not accept it, and will not.
            DeliveryError: it did not arrive, or this cannot be known; another attempt may succeed.
        """

    def add_in_progress(self, job_id: str) -> None:
        """Report the job as in progress with each ping from now on."""

    def remove_in_progress(self, job_id: str) -> None:
        """Stop reporting the job."""
