"""What the job loop needs of a platform's queue. A client of another platform implements `JobQueue`."""

from __future__ import annotations

from enum import Enum
from typing import Any, Protocol

from engine.errors import JobError

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


class Delivery(Protocol):
    """Delivers one job's outputs and its end, in the form that the platform wants.

    Attributes:
        delivered_count: how many outputs have arrived.
        time_limit_s: how long the job may run for the platform's sake, in seconds; None for no limit.
    """

    delivered_count: int
    time_limit_s: float | None

    async def stream(self, output: Any) -> None:
        """Deliver an output.

        Raises:
            JobError: the platform refuses it; the job ends with this error.
            DeliveryError: it did not arrive in time.
        """

    async def finish(self, error: JobError | None = None, *, replace_worker: bool = False) -> str:
        """Deliver the job's end. What cannot be delivered is logged.

        Args:
            error: why the job failed.
            replace_worker: ask the platform to replace this worker, if it can be asked.

        Returns:
            The outcome of the job: "completed", "failed", "stopped" or "undelivered".
        """

    async def stopped(self) -> None:
        """End the delivery of a job that was stopped: it has no result."""


class JobQueue(Protocol):
    """A platform's queue, seen from one worker."""

    async def take(self, count: int) -> list[Any]:
        """Return up to `count` jobs; none if none came while the platform held the call open.

        What stands where a job is expected may be anything; the loop checks it.

        It must not be cancelled while the platform may be answering, as a job could be on its way: call `stop_polling`.

        Raises:
            RateLimitedError: the platform asks to wait.
            UnusableQueueError: no job will come any more; the worker ends.
            Exception: the platform cannot be reached; the loop logs it and tries again.
        """

    def stop_polling(self) -> None:
        """Tell the platform that no job is wanted any more, and still receive one that is on its way."""

    def reconnect(self) -> None:
        """Open new connections, as the worker was frozen: the old ones may be dead.

        Polls in progress still bring what is on its way, and end within `POLL_CANCEL_GRACE_S`, also by an exception.
        """

    async def stop_signals(self) -> list[str]:
        """Return the ids of jobs to stop; none if there were none while the platform held the call open.

        Raises:
            RateLimitedError: the platform asks to wait.
            Exception: the platform cannot be reached; the loop logs it and tries again.
        """

    def delivery(self, job_id: str, deadline: float) -> Delivery:
        """Return the delivery of a job that starts now.

        Args:
            job_id: the job's.
            deadline: when the job's time is over, by `engine.run_clock`; deliveries are tried until then.
        """

    def add_in_progress(self, job_id: str) -> None:
        """Report the job as in progress with each ping from now on."""

    def remove_in_progress(self, job_id: str) -> None:
        """Stop reporting the job."""
