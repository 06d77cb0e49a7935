"""The queue of one endpoint: a state machine without I/O, threads or a clock of its own.

    submit ──▶ IN_QUEUE ──take──▶ IN_PROGRESS ──finish──▶ COMPLETED | FAILED
                  ▲  │                │  │
                  │  └── cancel, purge ──┴────────────────▶ CANCELLED
                  │  └── ttl, executionTimeout ───────────▶ TIMED_OUT
                  └──── worker lost ──┘ (after max_retries ──▶ FAILED)

    FAILED | TIMED_OUT ──retry──▶ IN_QUEUE

A job is assigned to at most one worker at a time, and only that worker may post for it. A `QueueListener` is notified
of changes; nothing here waits.
"""

from __future__ import annotations

import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from emulator.core.job import Job, JobStatus, Submission
from emulator.core.work import QueueLoad
from emulator.errors import JobNotAssignedError, JobStateError, NotFoundError, TooManyRequestsError

# "Requests receive a 429 status if queue size exceeds 50 jobs and exceeds MAX_WORKERS * 500."
FULL_QUEUE_JOBS = 50
FULL_QUEUE_JOBS_PER_WORKER = 500

# Looking for expired results visits every job that is kept.
CLEANUP_INTERVAL_S = 1.0

JOBS_QUEUED_TOPIC = "jobs-queued"
"""The topic that changes when a job enters the queue."""


def job_topic(job_id: str) -> str:
    """Return the topic that changes with one job."""
    return f"job/{job_id}"


def job_stop_topic(worker: str) -> str:
    """Return the topic that changes when one worker must stop a job."""
    return f"stop/{worker}"


class QueueListener(Protocol):
    """Is notified of what happens in a queue."""

    def on_change(self, topic: str) -> None:
        """Handle a change of what the topic stands for."""

    def on_job_ended(self, job: Job) -> None:
        """Handle a job that has reached a final state."""


@dataclass(frozen=True)
class QueueSettings:
    """Settings of a queue.

    Args:
        execution_timeout_s: maximum time of one run, unless the job's policy has one.
        lost_after_s: a job that its worker has not reported for this long is lost.
        stop_grace_s: a worker that still reports a job this long after its stop signal is unresponsive.
        max_retries: how many times a lost job is queued again before it fails.
        max_workers: `workersMax` of the endpoint, which determines the maximum length of the queue.
    """

    execution_timeout_s: float = 600.0
    lost_after_s: float = 40.0
    stop_grace_s: float = 30.0
    max_retries: int = 1
    max_workers: int = 3


class JobQueue:
    """The jobs of one endpoint.

    Args:
        settings: settings of the queue.
        clock: monotonic time in seconds.
        listener: is notified of changes.
    """

    def __init__(self, settings: QueueSettings, clock: Callable[[], float], listener: QueueListener) -> None:
        self.settings = settings
        """May be replaced at any time."""
        self._clock = clock
        self._listener = listener
        self._jobs: dict[str, Job] = {}
        self._unfinished: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        # By worker, then by job id.
        self._running: dict[str, dict[str, Job]] = {}
        self._stop_signals: dict[str, list[str]] = {}
        self._stop_requested_at: dict[str, dict[str, float]] = {}
        self._unresponsive: set[str] = set()
        self._next_cleanup_at = 0.0
        self.end_counts: Counter[JobStatus] = Counter()
        self.retried = 0

    # Operations of clients.

    def submit(self, submission: Submission, *, prefix: str = "", kind: str = "run", retention_s: float) -> Job:
        """Queue a job; its id is `{prefix}{uuid}-u1`, the platform's format.

        Raises:
            TooManyRequestsError: the queue is full.
        """
        self._check_length()
        now = self._clock()
        job = Job(f"{prefix}{uuid.uuid4()}-u1", submission, now, now, retention_s, kind)
        self._jobs[job.id] = job
        self._unfinished[job.id] = job
        self._waiting.append(job)
        self._listener.on_change(JOBS_QUEUED_TOPIC)
        return job

    def job(self, job_id: str) -> Job:
        """Return the job with this id.

        Raises:
            NotFoundError: there is none, or its retention has ended.
        """
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFoundError(f"job {job_id} not found: it was never submitted, or its result has expired") from None

    def read_stream(self, job: Job) -> list[Any]:
        """Return the outputs since the last call."""
        outputs = job.outputs[job.streamed :]
        job.streamed = len(job.outputs)
        return outputs

    def cancel(self, job_id: str) -> Job:
        """Cancel a job that waits or runs; a job that has ended stays as it is."""
        job = self.job(job_id)
        if not job.status.final:
            self._end(job, JobStatus.CANCELLED)
        return job

    def retry(self, job_id: str) -> Job:
        """Queue a failed or timed-out job again, with the same id and input and without the results of earlier runs.

        Raises:
            JobStateError: it is in another state.
            TooManyRequestsError: the queue is full.
        """
        job = self.job(job_id)
        if job.status not in (JobStatus.FAILED, JobStatus.TIMED_OUT):
            raise JobStateError(f"job {job_id} is {job.status}; only a FAILED or TIMED_OUT job can be retried")
        self._check_length()
        now = self._clock()
        job.submitted_at = job.queued_at = now
        job.status, job.retries, job.ended_at = JobStatus.IN_QUEUE, 0, None
        self._reset_run(job)
        self.retried += 1
        self._unfinished[job.id] = job
        self._waiting.append(job)
        self._notify(job)
        self._listener.on_change(JOBS_QUEUED_TOPIC)
        return job

    def purge(self) -> int:
        """Cancel all waiting jobs; return their number."""
        waiting = list(self._waiting)
        for job in waiting:
            self._end(job, JobStatus.CANCELLED)
        return len(waiting)

    def close(self) -> None:
        """Cancel all waiting and running jobs."""
        for job in list(self._unfinished.values()):
            self._end(job, JobStatus.CANCELLED)

    def set_result_ttl(self, job: Job, ttl_s: float) -> None:
        """Keep the job for this long from now, or from its end if it has not ended yet."""
        job.retention_s = ttl_s if job.ended_at is None else self._clock() - job.ended_at + ttl_s

    # Operations of workers.

    def take(self, worker: str, count: int) -> list[Job]:
        """Assign up to `count` waiting jobs to a worker, in the order of the queue."""
        now = self._clock()
        taken: list[Job] = []
        while self._waiting and len(taken) < count:
            job = self._waiting[0]
            if self._ttl_deadline(job) <= now:
                self._end(job, JobStatus.TIMED_OUT, "ttl exceeded")
                continue
            self._waiting.popleft()
            job.status, job.worker = JobStatus.IN_PROGRESS, worker
            job.taken_at = job.last_seen_at = now
            # The stop of an earlier run must stop neither this run nor, as unresponsive, its worker.
            self._stop_signals[worker] = [job_id for job_id in self.pop_stop_signals(worker) if job_id != job.id]
            self._stop_requested_at.get(worker, {}).pop(job.id, None)
            self._running.setdefault(worker, {})[job.id] = job
            taken.append(job)
            self._notify(job)
        return taken

    def stream(self, worker: str, job_id: str, output: Any) -> None:
        """Add an output to a running job of this worker.

        Raises:
            JobNotAssignedError: the job is not assigned to this worker.
        """
        job = self._assigned_job(worker, job_id)
        job.outputs.append(output)
        if job.first_output_at is None:
            job.first_output_at = job.last_seen_at
        self._notify(job)

    def progress(self, worker: str, job_id: str, output: Any) -> None:
        """Set what /status shows as the output of a running job of this worker.

        Raises:
            JobNotAssignedError: the job is not assigned to this worker.
        """
        job = self._assigned_job(worker, job_id)
        job.output = output
        self._notify(job)

    def finish(self, worker: str, job_id: str, output: Any = None, error: str | None = None) -> Job:
        """End a running job of this worker: as failed if there is an error, as completed otherwise.

        Raises:
            JobNotAssignedError: the job is not assigned to this worker.
        """
        job = self._assigned_job(worker, job_id)
        job.output = output
        self._end(job, JobStatus.COMPLETED if error is None else JobStatus.FAILED, error)
        return job

    def ping(self, worker: str, job_ids: Iterable[str]) -> None:
        """Record that a worker reports these jobs."""
        now = self._clock()
        reported = set(job_ids)
        for job_id in reported & self._running.get(worker, {}).keys():
            self._running[worker][job_id].last_seen_at = now
        requested_at = {
            job_id: at for job_id, at in self._stop_requested_at.get(worker, {}).items() if job_id in reported
        }
        if requested_at:
            self._stop_requested_at[worker] = requested_at
            if now - min(requested_at.values()) > self.settings.stop_grace_s:
                self._unresponsive.add(worker)
        else:
            self._stop_requested_at.pop(worker, None)

    def pop_stop_signals(self, worker: str) -> list[str]:
        """Return the ids of jobs that this worker must stop, each once."""
        return self._stop_signals.pop(worker, [])

    def on_worker_lost(self, worker: str) -> None:
        """Return a lost worker's jobs to the head of the queue, in their order."""
        for job in reversed(self.running_jobs(worker)):
            self._requeue_or_fail(job)
        self._stop_signals.pop(worker, None)
        self._stop_requested_at.pop(worker, None)
        self._unresponsive.discard(worker)

    # Time-outs and counts.

    def expire(self) -> None:
        """Time jobs out, requeue lost jobs, and remove expired results."""
        now = self._clock()
        # In reverse, so that the lost jobs of a worker keep their order at the head of the queue.
        for job in reversed(list(self._unfinished.values())):
            if self._ttl_deadline(job) <= now:
                self._end(job, JobStatus.TIMED_OUT, "ttl exceeded")
            elif self._execution_deadline(job) <= now:
                self._end(job, JobStatus.TIMED_OUT, "executionTimeout exceeded")
            elif job.status is JobStatus.IN_PROGRESS and now - job.last_seen_at >= self.settings.lost_after_s:
                self._requeue_or_fail(job)
        if now >= self._next_cleanup_at:
            self._next_cleanup_at = now + CLEANUP_INTERVAL_S
            for job in [job for job in self._jobs.values() if _expires_at(job) <= now]:
                self._remove(job)

    def running_jobs(self, worker: str) -> list[Job]:
        """Return the jobs that are assigned to a worker."""
        return list(self._running.get(worker, {}).values())

    def unresponsive_workers(self) -> set[str]:
        """Return the workers that still report a job long after its stop signal."""
        return set(self._unresponsive)

    def recent(self, count: int) -> list[Job]:
        """Return the jobs that were submitted last, newest first."""
        return list(reversed(list(self._jobs.values())[-count:]))

    @property
    def in_queue(self) -> int:
        """Number of waiting jobs."""
        return len(self._waiting)

    @property
    def in_progress(self) -> int:
        """Number of running jobs."""
        return sum(map(len, self._running.values()))

    def load(self) -> QueueLoad:
        """Return the input of the autoscaler."""
        waits = [self._clock() - job.queued_at for job in self._waiting if not job.low_priority]
        running = sum(not job.low_priority for jobs in self._running.values() for job in jobs.values())
        return QueueLoad(len(waits), running, max(waits, default=0.0))

    def health(self) -> dict[str, int]:
        """Return the `jobs` of /health."""
        return {
            "completed": self.end_counts[JobStatus.COMPLETED],
            "failed": self.end_counts[JobStatus.FAILED] + self.end_counts[JobStatus.TIMED_OUT],
            "inProgress": self.in_progress,
            "inQueue": self.in_queue,
            "retried": self.retried,
        }

    def _check_length(self) -> None:
        maximum = max(FULL_QUEUE_JOBS, FULL_QUEUE_JOBS_PER_WORKER * self.settings.max_workers)
        if len(self._waiting) > maximum:
            raise TooManyRequestsError(f"the queue is full: {len(self._waiting)} jobs, limit {maximum}")

    def _assigned_job(self, worker: str, job_id: str) -> Job:
        """Return a running job of this worker, and record that the worker reports it."""
        job = self._running.get(worker, {}).get(job_id)
        if job is None:
            raise JobNotAssignedError(f"job {job_id} is not assigned to worker {worker}")
        job.last_seen_at = self._clock()
        return job

    def _end(self, job: Job, status: JobStatus, error: str | None = None) -> None:
        """Set a final state; the only place that does."""
        if job.status is JobStatus.IN_QUEUE:
            self._waiting.remove(job)
        elif job.worker is not None:
            self._unassign(job)
            if status in (JobStatus.CANCELLED, JobStatus.TIMED_OUT):
                self._stop_signals.setdefault(job.worker, []).append(job.id)
                self._stop_requested_at.setdefault(job.worker, {})[job.id] = self._clock()
                self._listener.on_change(job_stop_topic(job.worker))
        del self._unfinished[job.id]
        job.status, job.error, job.ended_at = status, error, self._clock()
        self.end_counts[status] += 1
        self._notify(job)
        self._listener.on_job_ended(job)

    def _requeue_or_fail(self, job: Job) -> None:
        """Handle a job whose worker is lost, or no longer reports it."""
        if job.retries >= self.settings.max_retries:
            # The platform's message.
            self._end(job, JobStatus.FAILED, f"job timed out after {job.retries} retries")
            return
        self._unassign(job)
        job.retries += 1
        self.retried += 1
        job.status, job.queued_at = JobStatus.IN_QUEUE, self._clock()
        self._reset_run(job)
        self._waiting.appendleft(job)
        self._notify(job)
        self._listener.on_change(JOBS_QUEUED_TOPIC)

    def _unassign(self, job: Job) -> None:
        if job.worker is None:
            return
        jobs = self._running[job.worker]
        del jobs[job.id]
        if not jobs:
            del self._running[job.worker]

    @staticmethod
    def _reset_run(job: Job) -> None:
        job.worker = job.taken_at = job.first_output_at = None
        job.output = job.error = None
        job.outputs, job.streamed = [], 0

    def _remove(self, job: Job) -> None:
        """Remove a job, and its stop signals for workers that no longer send requests."""
        del self._jobs[job.id]
        for requested_at in self._stop_requested_at.values():
            requested_at.pop(job.id, None)
        for signals in self._stop_signals.values():
            if job.id in signals:
                signals.remove(job.id)

    def _notify(self, job: Job) -> None:
        self._listener.on_change(job_topic(job.id))

    @staticmethod
    def _ttl_deadline(job: Job) -> float:
        return job.submitted_at + job.submission.policy.ttl_ms / 1000

    def _execution_deadline(self, job: Job) -> float:
        if job.taken_at is None:
            return float("inf")
        timeout_ms = job.submission.policy.execution_timeout_ms
        return job.taken_at + (self.settings.execution_timeout_s if timeout_ms is None else timeout_ms / 1000)


def _expires_at(job: Job) -> float:
    return float("inf") if job.ended_at is None else job.ended_at + job.retention_s
