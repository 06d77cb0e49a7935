"""What a job is, its states, and the platform's documented limits.

Sources: docs.runpod.io, "Operation reference", "Send API requests", "Job states and metrics" and "Endpoint settings";
runpod 1.12.0 for the worker's side. `docs/decisions/0084-what-the-emulator-assumes.md` lists the assumptions where they
say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, HttpUrl

from emulator.core.work import Durations

# "Maximum payload size" of /run and of /runsync.
MAX_RUN_BODY_BYTES: Final = 10 * 1024 * 1024
MAX_RUNSYNC_BODY_BYTES: Final = 20 * 1024 * 1024
# "Maximum size for a single streamed payload chunk is 1 MB", measured on the JSON that a worker posts.
MAX_CHUNK_BYTES: Final = 1_000_000
# The SDK warns above it: "exceeds the 20 MB limit" (`rp_tips.check_return_size`).
MAX_RESULT_BYTES: Final = 20_000_000

# "Default wait time: 90 seconds (adjustable via ?wait=x, 1000-300000 ms)".
RUNSYNC_WAIT_MS: Final = 90_000
RUNSYNC_WAIT_RANGE_MS: Final = (1_000, 300_000)

# "Result retention: 30 minutes" after /run, "1 minute" after /runsync.
RUN_RETENTION_S: Final = 30 * 60.0
RUNSYNC_RETENTION_S: Final = 60.0

_WEEK_MS: Final = 7 * 24 * 60 * 60 * 1000


class JobStatus(StrEnum):
    """A job's state, as the platform names it."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def final(self) -> bool:
        """Whether a job in this state has ended."""
        return self not in (JobStatus.IN_QUEUE, JobStatus.IN_PROGRESS)


class Policy(BaseModel):
    """The `policy` of a submission.

    Args:
        executionTimeout: maximum time of one run in ms; None: the endpoint's setting.
        ttl: maximum time from the submission to the end in ms.
        lowPriority: the job does not count for the autoscaler; it waits for workers that other jobs started.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    execution_timeout_ms: int | None = Field(None, alias="executionTimeout", ge=5_000, le=_WEEK_MS)
    ttl_ms: int = Field(24 * 60 * 60 * 1000, alias="ttl", ge=10_000, le=_WEEK_MS)
    low_priority: bool = Field(default=False, alias="lowPriority")


class Submission(BaseModel):
    """The body of /run and /runsync."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, hide_input_in_errors=True)

    input: Any = Field(...)
    policy: Policy = Policy()
    webhook: HttpUrl | None = None
    s3_config: dict[str, Any] | None = Field(None, alias="s3Config")


@dataclass(eq=False)
class Job(Durations):
    """One job, from its submission to the end of its retention. All times are the queue's clock, in seconds.

    Args:
        queued_at: when it last entered the queue.
        retention_s: how long it is kept after its end.
        kind: how it was submitted: `run`, `runsync`, or the gateway's route.
        worker: the worker that it is, or was last, assigned to.
        last_seen_at: when its worker last reported it.
        outputs: outputs that its worker has streamed in this run.
        streamed: how many of them `/stream` has returned.
        retries: how many times it was queued again because its worker was lost.
    """

    id: str
    submission: Submission
    submitted_at: float
    queued_at: float
    retention_s: float
    kind: str
    status: JobStatus = JobStatus.IN_QUEUE
    worker: str | None = None
    taken_at: float | None = None
    last_seen_at: float = 0.0
    first_output_at: float | None = None
    ended_at: float | None = None
    outputs: list[Any] = field(default_factory=list)
    streamed: int = 0
    output: Any = None
    error: str | None = None
    retries: int = 0

    @property
    def low_priority(self) -> bool:
        """Whether the autoscaler ignores it."""
        return self.submission.policy.low_priority

    @property
    def output_count(self) -> int:
        """How many outputs its worker has streamed in this run."""
        return len(self.outputs)

    def platform_document(self) -> dict[str, Any]:
        """Return what only RunPod has: `lowPriority`."""
        return {"lowPriority": self.low_priority}

    def worker_document(self) -> dict[str, Any]:
        """Return the job as a worker receives it: `{"id", "input"}`, and `s3Config` if the client sent one."""
        document = {"id": self.id, "input": self.submission.input}
        if self.submission.s3_config is not None:
            document["s3Config"] = self.submission.s3_config
        return document

    def document(self) -> dict[str, Any]:
        """Return the body of /status, of /runsync and of the webhook.

        `id` and `status` always; `delayTime` (ms) and `workerId` after the first take; `executionTime` (ms) after the
        end of a run; `output`, `error` and `retries` if there are any.
        """
        document: dict[str, Any] = {"id": self.id, "status": self.status.value}
        if self.delay_ms is not None:
            document |= {"delayTime": self.delay_ms, "workerId": self.worker}
        if self.execution_ms is not None:
            document["executionTime"] = self.execution_ms
        if self.output is not None:
            document["output"] = self.output
        if self.error is not None:
            document["error"] = self.error
        if self.retries:
            document["retries"] = self.retries
        return document
