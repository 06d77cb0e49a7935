"""Random sequences of operations on the queue, compared with a simple model of it.

In any order of takes, updates, cancellations, worker losses and time-outs, each job ends in exactly one final state, no
job is assigned to two workers, and the counts are right.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, initialize, invariant, multiple, rule

from emulator.core.job import JobStatus, Policy, Submission
from emulator.core.job_queue import JobQueue, QueueSettings
from emulator.errors import JobNotAssignedError, JobStateError
from tests.unit.emulator.fakes import FakeClock, RecordingListener

WORKERS = ["a", "b", "c"]
SETTINGS = QueueSettings(execution_timeout_s=60.0, lost_after_s=40.0, stop_grace_s=30.0, max_retries=2, max_workers=3)


@dataclass
class JobModel:
    """The expected state of a job."""

    id: str
    ttl_s: float
    timeout_s: float
    submitted_at: float
    state: str = "IN_QUEUE"
    # Position in the queue: a requeued job gets a rank below the lowest.
    rank: float = 0.0
    worker: str | None = None
    taken_at: float = 0.0
    seen_at: float = 0.0
    losses: int = 0
    end_count: int = 0
    order: int = 0


class QueueMachine(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.listener = RecordingListener()
        self.queue = JobQueue(SETTINGS, self.clock, self.listener)
        self.models: dict[str, JobModel] = {}
        self.signals: dict[str, list[str]] = {worker: [] for worker in WORKERS}
        self.retried = 0
        self.counter = 0

    @initialize(target=jobs, count=st.integers(0, 4))
    def begin(self, count: int) -> MultipleResults[str]:
        return multiple(*(self._submit(1000, None) for _ in range(count)))

    # Operations of the model.

    def _next(self) -> int:
        self.counter += 1
        return self.counter

    def _waiting(self) -> list[JobModel]:
        return sorted((m for m in self.models.values() if m.state == "IN_QUEUE"), key=lambda m: m.rank)

    def _running(self, worker: str) -> list[JobModel]:
        running = (m for m in self.models.values() if m.state == "IN_PROGRESS" and m.worker == worker)
        return sorted(running, key=lambda m: m.taken_at)

    def _end(self, model: JobModel, state: str) -> None:
        if model.state == "IN_PROGRESS" and state in ("CANCELLED", "TIMED_OUT"):
            self.signals[model.worker or ""].append(model.id)
        model.state = state
        model.end_count += 1

    def _requeue_or_fail(self, models: list[JobModel]) -> None:
        lowest = min((m.rank for m in self._waiting()), default=0.0)
        returning = [m for m in models if m.losses < SETTINGS.max_retries]
        for place, model in enumerate(returning):
            model.rank = lowest - len(returning) + place
        for model in models:
            if model in returning:
                model.state, model.worker = "IN_QUEUE", None
                model.losses += 1
                self.retried += 1
            else:
                self._end(model, "FAILED")

    # Operations that are tested.

    @rule(target=jobs, ttl_s=st.sampled_from([1000, 10]), timeout_s=st.sampled_from([None, 30]))
    def submit(self, ttl_s: int, timeout_s: int | None) -> str:
        return self._submit(ttl_s, timeout_s)

    def _submit(self, ttl_s: int, timeout_s: int | None) -> str:
        policy = Policy(ttl=ttl_s * 1000, executionTimeout=None if timeout_s is None else timeout_s * 1000)
        job = self.queue.submit(Submission(input="x", policy=policy), retention_s=1e12)
        self.models[job.id] = JobModel(
            job.id,
            ttl_s,
            SETTINGS.execution_timeout_s if timeout_s is None else timeout_s,
            self.clock.now,
            rank=self._next(),
            order=self._next(),
        )
        return job.id

    @rule(worker=st.sampled_from(WORKERS), count=st.integers(1, 3))
    def take(self, worker: str, count: int) -> None:
        taken = [job.id for job in self.queue.take(worker, count)]
        expected: list[str] = []
        for model in self._waiting():
            if len(expected) == count:
                break
            if model.submitted_at + model.ttl_s <= self.clock.now:
                self._end(model, "TIMED_OUT")
                continue
            model.state, model.worker = "IN_PROGRESS", worker
            model.taken_at = model.seen_at = self.clock.now
            self.signals[worker] = [job_id for job_id in self.signals[worker] if job_id != model.id]
            expected.append(model.id)
        assert taken == expected

    @rule(worker=st.sampled_from(WORKERS), job_id=jobs, kind=st.sampled_from(["stream", "progress", "done", "error"]))
    def update(self, worker: str, job_id: str, kind: str) -> None:
        model = self.models[job_id]
        is_assigned = model.state == "IN_PROGRESS" and model.worker == worker
        try:
            match kind:
                case "stream":
                    self.queue.stream(worker, job_id, "o")
                case "progress":
                    self.queue.progress(worker, job_id, "p")
                case "done":
                    self.queue.finish(worker, job_id, "result")
                case "error":
                    self.queue.finish(worker, job_id, None, "it broke")
        except JobNotAssignedError:
            assert not is_assigned
            return
        assert is_assigned
        model.seen_at = self.clock.now
        if kind in ("done", "error"):
            self._end(model, "COMPLETED" if kind == "done" else "FAILED")

    @rule(worker=st.sampled_from(WORKERS), reported=st.sets(jobs, max_size=4))
    def ping(self, worker: str, reported: set[str]) -> None:
        self.queue.ping(worker, reported)
        for model in self._running(worker):
            if model.id in reported:
                model.seen_at = self.clock.now

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        self.queue.cancel(job_id)
        model = self.models[job_id]
        if model.state in ("IN_QUEUE", "IN_PROGRESS"):
            self._end(model, "CANCELLED")

    @rule(job_id=jobs)
    def retry(self, job_id: str) -> None:
        model = self.models[job_id]
        try:
            self.queue.retry(job_id)
        except JobStateError:
            assert model.state not in ("FAILED", "TIMED_OUT")
            return
        assert model.state in ("FAILED", "TIMED_OUT")
        model.state, model.worker, model.losses = "IN_QUEUE", None, 0
        model.submitted_at = self.clock.now
        model.rank, model.order = self._next(), self._next()
        self.retried += 1

    @rule(do_purge=st.sampled_from([False, False, False, True]))
    def purge(self, do_purge: bool) -> None:
        # Rarely, or else the queue would be empty most of the time.
        if not do_purge:
            return
        waiting = self._waiting()
        assert self.queue.purge() == len(waiting)
        for model in waiting:
            self._end(model, "CANCELLED")

    @rule(worker=st.sampled_from(WORKERS), take_and_lose_again=st.booleans())
    def lose_worker(self, worker: str, take_and_lose_again: bool) -> None:
        self._lose_worker(worker)
        if take_and_lose_again:
            self.take(worker, 3)
            self._lose_worker(worker)

    def _lose_worker(self, worker: str) -> None:
        running = {job.id for job in self.queue.running_jobs(worker)}
        assert running == {model.id for model in self._running(worker)}
        in_order = [self.models[job.id] for job in self.queue.running_jobs(worker)]
        self.queue.on_worker_lost(worker)
        self._requeue_or_fail(in_order)
        self.signals[worker] = []

    @rule(worker=st.sampled_from(WORKERS))
    def fetch_stop_signals(self, worker: str) -> None:
        assert self.queue.pop_stop_signals(worker) == self.signals[worker]
        self.signals[worker] = []

    @rule(seconds=st.sampled_from([0.5, 11, 41]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def expire(self) -> None:
        self.queue.expire()
        now = self.clock.now
        lost = []
        # The queue handles the newest job first, which determines the order of the stop signals.
        for model in sorted(self.models.values(), key=lambda m: -m.order):
            if model.state not in ("IN_QUEUE", "IN_PROGRESS"):
                continue
            runs = model.state == "IN_PROGRESS"
            if model.submitted_at + model.ttl_s <= now or (runs and model.taken_at + model.timeout_s <= now):
                self._end(model, "TIMED_OUT")
            elif runs and now - model.seen_at >= SETTINGS.lost_after_s:
                lost.append(model)
        self._requeue_or_fail(sorted(lost, key=lambda m: m.order))

    # Invariants.

    @invariant()
    def every_job_matches_the_model(self) -> None:
        for model in self.models.values():
            job = self.queue.job(model.id)
            assert job.status.value == model.state
            if model.state == "IN_PROGRESS":
                assert job.worker == model.worker

    @invariant()
    def the_queue_order_matches_the_model(self) -> None:
        assert [job.id for job in self.queue._waiting] == [model.id for model in self._waiting()]

    @invariant()
    def no_job_is_assigned_twice(self) -> None:
        assigned = Counter(job.id for worker in WORKERS for job in self.queue.running_jobs(worker))
        assert all(count == 1 for count in assigned.values())
        assert set(assigned) == {model.id for model in self.models.values() if model.state == "IN_PROGRESS"}

    @invariant()
    def every_end_is_notified_once(self) -> None:
        assert Counter(self.listener.ended_jobs) == Counter(
            {m.id: m.end_count for m in self.models.values() if m.end_count}
        )

    @invariant()
    def the_counts_match_the_model(self) -> None:
        states = Counter(model.state for model in self.models.values())
        health = self.queue.health()
        assert health["inQueue"] == states["IN_QUEUE"]
        assert health["inProgress"] == states["IN_PROGRESS"]
        assert health["retried"] == self.retried
        end_count = sum(model.end_count for model in self.models.values())
        assert health["completed"] + health["failed"] + self.queue.end_counts[JobStatus.CANCELLED] == end_count

    def teardown(self) -> None:
        # After its ttl, every job has ended.
        self.clock.now += 1e6
        self.queue.expire()
        for model in self.models.values():
            job = self.queue.job(model.id)
            assert job.status.final
            if model.state not in ("IN_QUEUE", "IN_PROGRESS"):
                assert job.status.value == model.state
        assert self.queue.in_queue == self.queue.in_progress == 0


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
