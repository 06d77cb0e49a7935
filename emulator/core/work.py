"""What fleet, autoscaler and page need of a queue, whichever platform's it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class QueueLoad:
    """Input of the autoscaler: counts of jobs of normal priority, and the longest time that one has waited."""

    waiting: int
    running: int
    longest_wait_s: float


class Durations:
    """How long a job or task has waited and run, from its times."""

    submitted_at: float
    taken_at: float | None
    ended_at: float | None

    @property
    def delay_ms(self) -> int | None:
        """Time from the submission to the start of the last run; None before the first run."""
        return None if self.taken_at is None else round((self.taken_at - self.submitted_at) * 1000)

    @property
    def execution_ms(self) -> int | None:
        """Duration of the last run; None if no run has ended."""
        if self.taken_at is None or self.ended_at is None:
            return None
        return round((self.ended_at - self.taken_at) * 1000)


class Work(Protocol):
    """One job or task, as the page shows it. All times are the queue's clock, in seconds."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def kind(self) -> str:
        """How it was submitted: an operation of the API, or a path of the OpenAI gateway."""

    @property
    def status(self) -> str:
        """Its state, as the platform names it."""

    @property
    def worker(self) -> str | None:
        """The worker that it is, or was last, assigned to."""

    @property
    def submitted_at(self) -> float:
        """When the client sent it."""

    @property
    def taken_at(self) -> float | None:
        """When its worker took it; None before."""

    @property
    def first_output_at(self) -> float | None:
        """When its first output arrived; None before."""

    @property
    def ended_at(self) -> float | None:
        """When it ended; None before."""

    @property
    def delay_ms(self) -> int | None:
        """Time in the queue; None before the first run."""

    @property
    def execution_ms(self) -> int | None:
        """Duration of its last run; None if no run has ended."""

    @property
    def output_count(self) -> int:
        """How many pieces of its output have arrived."""

    @property
    def retries(self) -> int:
        """How many times it was queued again because its worker was lost."""

    def platform_document(self) -> dict[str, Any]:
        """Return what only this platform shows of it."""


class WorkQueue(Protocol):
    """The queue of an endpoint."""

    @property
    def in_queue(self) -> int:
        """Number of waiting jobs."""

    @property
    def in_progress(self) -> int:
        """Number of running jobs."""

    def expire(self) -> None:
        """Apply all time limits; called several times a second."""

    def load(self) -> QueueLoad:
        """Return the input of the autoscaler."""

    def running_jobs(self, worker: str) -> Sequence[Work]:
        """Return the jobs that are assigned to a worker."""

    def on_worker_lost(self, worker: str) -> None:
        """Handle the end of a worker, which may have jobs."""

    def unresponsive_workers(self) -> set[str]:
        """Return the workers that must be stopped because they ignore the platform."""

    def recent(self, count: int) -> Sequence[Work]:
        """Return the jobs that were submitted last, newest first."""

    def health(self) -> dict[str, int]:
        """Return counts of jobs: `inQueue`, `inProgress`, `completed`, `failed`, `retried`."""

    def close(self) -> None:
        """End all jobs."""
