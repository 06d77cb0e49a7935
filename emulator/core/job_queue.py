"""The queue of one endpoint: a state machine without I/O, threads or a clock of its own.

    submit ──▶ IN_QUEUE ──take──▶ IN_PROGRESS ──finish──▶ COMPLETED | FAILED
                  ▲  │                │  │
                  │  └── cancel, purge ──┴────────────────▶ CANCELLED
                  │  └── ttl, executionTimeout ───────────▶ TIMED_OUT
                  └──── worker lost ──┘ (once too often ──▶ FAILED)

A job is held by at most one worker, and only that worker may deliver for it. Whoever waits for a change is told by the
`Listener`; nothing here waits.
"""

from __future__ import annotations

import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from emulator.core.job import Job, JobStatus, Submission
from emulator.errors import NotFoundError, NotHeldError, TooManyRequestsError, WrongStateError

# "Requests receive a 429 status if queue size exceeds 50 jobs and exceeds MAX_WORKERS * 500."
FULL_QUEUE_JOBS = 50
FULL_QUEUE_JOBS_PER_WORKER = 500

# Results that are kept no longer are looked for so often: it means looking at each that is kept.
FORGET_EACH_S = 1.0

WAITING = "waiting"
"""The topic that changes when jobs begin to wait."""


def job_topic(job_id: str) -> str:
    """The topic that changes with one job."""
    return f"job/{job_id}"


def stop_topic(worker: str) -> str:
    """The topic that changes when one worker is to stop a job."""
    return f"stop/{worker}"


class Listener(Protocol):
    """Who is told what happens in a queue."""

    def changed(self, topic: str) -> None:
        """Something that the topic stands for is no longer as it was."""

    def ended(self, job: Job) -> None:
        """The job has reached its final state."""


@dataclass(frozen=True)
class Rules:
    """What a queue goes by.

    Args:
        execution_timeout_s: most time of one run, where the job's policy says nothing.
        lost_after_s: a job that its worker has not shown for so long is lost to that worker.
        stop_grace_s: a worker that still shows a job so long after it was to stop it does not obey.
        max_retries: how many times a job goes back to the queue before it fails.
        max_workers: the endpoint's `workersMax`, which bounds the queue.
    """

    execution_timeout_s: float = 600.0
    lost_after_s: float = 40.0
    stop_grace_s: float = 30.0
    max_retries: int = 1
    max_workers: int = 3


@dataclass(frozen=True)
class Load:
    """What the autoscaler sees: jobs of normal priority, and how long the first of them has waited."""

    waiting: int
    running: int
    longest_wait_s: float


class Queue:
    """The jobs of one endpoint.

    Args:
        rules: what it goes by.
        clock: the time in seconds, never going back.
        listener: who is told what happens.
    """

    def __init__(self, rules: Rules, clock: Callable[[], float], listener: Listener) -> None:
        self._rules = rules
        self._clock = clock
        self._listener = listener
        self._jobs: dict[str, Job] = {}
        self._live: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._held: dict[str, dict[str, Job]] = {}
        self._signals: dict[str, list[str]] = {}
        self._stopping: dict[str, dict[str, float]] = {}
        self._disobedient: set[str] = set()
        self._forget_at = 0.0
        self.ended: Counter[JobStatus] = Counter()
        self.retried = 0

    # The client's side.

    def submit(self, submission: Submission, *, prefix: str = "", label: str = "run", retention_s: float) -> Job:
        """Queue a job; its id is `{prefix}{uuid}-u1`, the form that the platform's have.

        Raises:
            TooManyRequestsError: the queue is full.
        """
        full = max(FULL_QUEUE_JOBS, FULL_QUEUE_JOBS_PER_WORKER * self._rules.max_workers)
        if len(self._waiting) > full:
            raise TooManyRequestsError(f"the queue holds {len(self._waiting)} jobs, more than {full}")
        now = self._clock()
        job = Job(f"{prefix}{uuid.uuid4()}-u1", submission, now, now, retention_s, label)
        self._jobs[job.id] = job
        self._live[job.id] = job
        self._waiting.append(job)
        self._listener.changed(WAITING)
        return job

    def job(self, job_id: str) -> Job:
        """The job with this id.

        Raises:
            NotFoundError: there is none, or its retention is over.
        """
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFoundError(f"there is no job {job_id}: it was never submitted, or its result expired") from None

    def read_stream(self, job: Job) -> list[Any]:
        """The outputs that have come since the last call."""
        fresh = job.outputs[job.streamed :]
        job.streamed = len(job.outputs)
        return fresh

    def cancel(self, job_id: str) -> Job:
        """End a job that waits or runs; one that has ended stays as it is."""
        job = self.job(job_id)
        if not job.status.final:
            self._end(job, JobStatus.CANCELLED)
        return job

    def retry(self, job_id: str) -> Job:
        """Queue a job anew that failed or timed out: same id and input, nothing left of its earlier runs.

        Raises:
            WrongStateError: it is in another state.
        """
        job = self.job(job_id)
        if job.status not in (JobStatus.FAILED, JobStatus.TIMED_OUT):
            raise WrongStateError(f"job {job_id} is {job.status}; only a FAILED or TIMED_OUT job can be retried")
        now = self._clock()
        job.submitted_at = job.queued_at = now
        job.status, job.retries, job.ended_at = JobStatus.IN_QUEUE, 0, None
        self._forget_run(job)
        self.retried += 1
        self._live[job.id] = job
        self._waiting.append(job)
        self._changed(job)
        self._listener.changed(WAITING)
        return job

    def purge(self) -> int:
        """Cancel all jobs that wait; return how many there were."""
        waiting = list(self._waiting)
        for job in waiting:
            self._end(job, JobStatus.CANCELLED)
        return len(waiting)

    def close(self) -> None:
        """Cancel all jobs that wait or run."""
        for job in list(self._live.values()):
            self._end(job, JobStatus.CANCELLED)

    def keep_result(self, job: Job, ttl_s: float) -> None:
        """Forget the job so long from now, or after its end where that is still to come."""
        job.retention_s = ttl_s if job.ended_at is None else self._clock() - job.ended_at + ttl_s

    # The worker's side.

    def take(self, worker: str, count: int) -> list[Job]:
        """Give a worker the first jobs that wait, `count` of them at most."""
        now = self._clock()
        taken: list[Job] = []
        while self._waiting and len(taken) < count:
            job = self._waiting[0]
            if self._ttl_ends(job) <= now:
                self._end(job, JobStatus.TIMED_OUT, "the job's time to live is over")
                continue
            self._waiting.popleft()
            job.status, job.worker = JobStatus.IN_PROGRESS, worker
            job.taken_at = job.seen_at = now
            job.runs += 1
            # A signal from an earlier run that this worker has not fetched yet would stop this one.
            self._signals[worker] = [job_id for job_id in self.stop_signals(worker) if job_id != job.id]
            self._held.setdefault(worker, {})[job.id] = job
            taken.append(job)
            self._changed(job)
        return taken

    def stream(self, worker: str, job_id: str, output: Any) -> None:
        """Add an output to a job that this worker holds.

        Raises:
            NotHeldError: it holds no such job.
        """
        job = self._held_job(worker, job_id)
        job.outputs.append(output)
        if job.first_output_at is None:
            job.first_output_at = job.seen_at
        self._changed(job)

    def progress(self, worker: str, job_id: str, output: Any) -> None:
        """Keep what a worker says of a job that it holds, for /status to show.

        Raises:
            NotHeldError: it holds no such job.
        """
        job = self._held_job(worker, job_id)
        job.output = output
        self._changed(job)

    def finish(self, worker: str, job_id: str, output: Any = None, error: str | None = None) -> Job:
        """End a job that this worker holds: completed, or failed where there is an error.

        Raises:
            NotHeldError: it holds no such job.
        """
        job = self._held_job(worker, job_id)
        job.output = output
        self._end(job, JobStatus.COMPLETED if error is None else JobStatus.FAILED, error)
        return job

    def ping(self, worker: str, job_ids: Iterable[str]) -> None:
        """A worker shows which jobs it has."""
        now = self._clock()
        shown = set(job_ids)
        for job_id in shown & self._held.get(worker, {}).keys():
            self._held[worker][job_id].seen_at = now
        stopping = {job_id: since for job_id, since in self._stopping.get(worker, {}).items() if job_id in shown}
        if stopping:
            self._stopping[worker] = stopping
            if now - min(stopping.values()) > self._rules.stop_grace_s:
                self._disobedient.add(worker)
        else:
            self._stopping.pop(worker, None)

    def stop_signals(self, worker: str) -> list[str]:
        """The jobs that this worker is to stop; each is told once."""
        return self._signals.pop(worker, [])

    def worker_lost(self, worker: str) -> None:
        """The worker is gone: its jobs go back to the head of the queue, in their order."""
        for job in reversed(list(self._held.get(worker, {}).values())):
            self._lose(job)
        self._signals.pop(worker, None)
        self._stopping.pop(worker, None)
        self._disobedient.discard(worker)

    # Time, and what others see.

    def expire(self) -> None:
        """Do what the time asks for: jobs that time out, jobs that are lost, results that are forgotten."""
        now = self._clock()
        # The last goes back first, so that the jobs of one worker keep their order at the head of the queue.
        for job in reversed(list(self._live.values())):
            if self._ttl_ends(job) <= now:
                self._end(job, JobStatus.TIMED_OUT, "the job's time to live is over")
            elif self._run_ends(job) <= now:
                self._end(job, JobStatus.TIMED_OUT, "executionTimeout exceeded")
            elif job.status is JobStatus.IN_PROGRESS and now - job.seen_at >= self._rules.lost_after_s:
                self._lose(job)
        if now >= self._forget_at:
            self._forget_at = now + FORGET_EACH_S
            for job in [job for job in self._jobs.values() if _forgotten_at(job) <= now]:
                self._forget(job)

    def held(self, worker: str) -> list[Job]:
        """The jobs that a worker holds."""
        return list(self._held.get(worker, {}).values())

    def disobedient(self) -> set[str]:
        """Workers that still show a job long after they were to stop it."""
        return set(self._disobedient)

    def recent(self, count: int) -> list[Job]:
        """The jobs submitted last, newest first."""
        return list(reversed(list(self._jobs.values())[-count:]))

    @property
    def in_queue(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    @property
    def in_progress(self) -> int:
        """How many jobs are held by workers."""
        return sum(map(len, self._held.values()))

    def load(self) -> Load:
        """What the autoscaler goes by."""
        waits = [self._clock() - job.queued_at for job in self._waiting if not job.low_priority]
        running = sum(not job.low_priority for jobs in self._held.values() for job in jobs.values())
        return Load(len(waits), running, max(waits, default=0.0))

    def health(self) -> dict[str, int]:
        """The `jobs` of /health."""
        return {
            "completed": self.ended[JobStatus.COMPLETED],
            "failed": self.ended[JobStatus.FAILED] + self.ended[JobStatus.TIMED_OUT],
            "inProgress": self.in_progress,
            "inQueue": self.in_queue,
            "retried": self.retried,
        }

    def _held_job(self, worker: str, job_id: str) -> Job:
        job = self._held.get(worker, {}).get(job_id)
        if job is None:
            raise NotHeldError(f"worker {worker} does not hold job {job_id}")
        job.seen_at = self._clock()
        return job

    def _end(self, job: Job, status: JobStatus, error: str | None = None) -> None:
        """The one way into a final state."""
        if job.status is JobStatus.IN_QUEUE:
            self._waiting.remove(job)
        elif job.worker is not None:
            self._release(job)
            if status in (JobStatus.CANCELLED, JobStatus.TIMED_OUT):
                self._signals.setdefault(job.worker, []).append(job.id)
                self._stopping.setdefault(job.worker, {})[job.id] = self._clock()
                self._listener.changed(stop_topic(job.worker))
        del self._live[job.id]
        job.status, job.error, job.ended_at = status, error, self._clock()
        self.ended[status] += 1
        self._changed(job)
        self._listener.ended(job)

    def _lose(self, job: Job) -> None:
        """The job's worker is gone, or has let it go unsaid."""
        if job.retries >= self._rules.max_retries:
            # The platform's own words.
            self._end(job, JobStatus.FAILED, f"job timed out after {job.retries} retries")
            return
        self._release(job)
        job.retries += 1
        self.retried += 1
        job.status, job.queued_at = JobStatus.IN_QUEUE, self._clock()
        self._forget_run(job)
        self._waiting.appendleft(job)
        self._changed(job)
        self._listener.changed(WAITING)

    def _release(self, job: Job) -> None:
        if job.worker is None:
            return
        held = self._held[job.worker]
        del held[job.id]
        if not held:
            del self._held[job.worker]

    @staticmethod
    def _forget_run(job: Job) -> None:
        job.worker = job.taken_at = job.first_output_at = None
        job.output = job.error = None
        job.outputs, job.streamed = [], 0

    def _forget(self, job: Job) -> None:
        """Keep nothing of a job, nor of the workers that were to stop it and have not been heard of since."""
        del self._jobs[job.id]
        for stopping in self._stopping.values():
            stopping.pop(job.id, None)
        for signals in self._signals.values():
            if job.id in signals:
                signals.remove(job.id)

    def _changed(self, job: Job) -> None:
        self._listener.changed(job_topic(job.id))

    @staticmethod
    def _ttl_ends(job: Job) -> float:
        return job.submitted_at + job.submission.policy.ttl_ms / 1000

    def _run_ends(self, job: Job) -> float:
        if job.taken_at is None:
            return float("inf")
        timeout_ms = job.submission.policy.execution_timeout_ms
        return job.taken_at + (self._rules.execution_timeout_s if timeout_ms is None else timeout_ms / 1000)


def _forgotten_at(job: Job) -> float:
    return float("inf") if job.ended_at is None else job.ended_at + job.retention_s
