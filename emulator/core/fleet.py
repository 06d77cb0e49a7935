"""The workers of one endpoint: started and stopped as the autoscaler decides, watched while they are there."""

from __future__ import annotations

import os
import random
import string
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from emulator.core.autoscaler import ACTIVE, Member, WorkerState, decide
from emulator.core.faults import Faults
from emulator.core.job_queue import Queue
from emulator.core.process import Process, Starter, worker_environment
from emulator.errors import NotFoundError
from emulator.redaction import Redaction
from emulator.settings import EndpointSettings

LOG_LINES = 50
_GONE_WORKERS = 10
_ID_LETTERS = 14
# "The system automatically retries with exponential backoff."
_MAX_BACKOFF_S = 60.0


class FleetListener(Protocol):
    """Who is told what happens in a fleet."""

    def event(self, line: str) -> None:
        """Something happened that belongs on the endpoint's timeline."""

    def worker_logged(self, worker: str, line: str) -> None:
        """A worker wrote a log line, without secrets."""

    def worker_stopping(self, worker: str) -> None:
        """A worker was asked to end: its long polls must not wait for more jobs."""


@dataclass(eq=False)
class Worker:
    """One worker, with or without a process of ours; times are the fleet's clock, in seconds.

    Args:
        seen_at: when it last called.
        polled: whether it has ever asked for a job.
        kill_at: when its grace is over, while it is stopping.
        jobs: how many jobs it has been given.
    """

    id: str
    state: WorkerState
    started_at: float
    since: float
    seen_at: float
    process: Process | None = None
    polled: bool = False
    kill_at: float | None = None
    killed: bool = False
    ready_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    reason: str = ""
    jobs: int = 0
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))


class Fleet:
    """Keeps as many workers as the endpoint's rules want.

    Args:
        settings: the endpoint's.
        queue: its jobs.
        listener: who is told what happens.
        base_url: where workers reach the emulator.
        worker_key: what workers authorize themselves with.
        ca_environment: variables by which workers trust the emulator's certificate.
        clock: the time in seconds, never going back.
        start: starts a process.
        faults: says how many workers are throttled.
        redaction: takes secrets out of log lines.
    """

    def __init__(  # noqa: PLR0913 (everything that it acts on, so that a test can put its own in place)
        self,
        settings: EndpointSettings,
        queue: Queue,
        listener: FleetListener,
        *,
        base_url: str,
        worker_key: str,
        ca_environment: Mapping[str, str],
        clock: Callable[[], float],
        start: Starter,
        faults: Faults,
        redaction: Redaction,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._listener = listener
        self._base_url = base_url
        self._worker_key = worker_key
        self._ca_environment = ca_environment
        self._clock = clock
        self._start = start
        self._faults = faults
        self._redaction = redaction
        self._workers: dict[str, Worker] = {}
        self._gone: deque[Worker] = deque(maxlen=_GONE_WORKERS)
        self._failures = 0
        self._start_after = 0.0
        self._closing = False

    # What workers do.

    def polled(self, worker_id: str) -> Worker:
        """A worker asks for jobs; one that we did not start is taken in.

        Raises:
            NotFoundError: it is not one of ours, and no more are taken in.
        """
        worker = self._workers.get(worker_id)
        now = self._clock()
        if worker is None:
            if self._closing:
                raise NotFoundError("the emulator ends")
            worker = Worker(worker_id, WorkerState.IDLE, now, now, now, reason="started by hand")
            self._workers[worker_id] = worker
            self._listener.event(f"worker {worker_id} came, started by hand")
        worker.seen_at = now
        if not worker.polled:
            worker.polled = True
            worker.ready_at = now
            self._failures = 0
            if worker.state is WorkerState.INITIALIZING:
                self._set(worker, WorkerState.IDLE)
                self._listener.event(f"worker {worker_id} ready after {now - worker.started_at:.1f} s")
        return worker

    def called(self, worker_id: str) -> None:
        """A worker shows that it is there."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.seen_at = self._clock()

    def may_take(self, worker: Worker) -> bool:
        """Whether it is given jobs: not while it is stopping, nor when it is given up."""
        return worker.state in (WorkerState.IDLE, WorkerState.RUNNING)

    def leaving(self, worker_id: str) -> bool:
        """Whether the worker has been told to end."""
        worker = self._workers.get(worker_id)
        return worker is None or worker.state is WorkerState.STOPPING

    def started_here(self, worker_id: str) -> bool:
        """Whether the worker is a process of ours."""
        worker = self._workers.get(worker_id)
        return worker is not None and worker.process is not None

    def unhealthy(self, worker_id: str, reason: str) -> None:
        """A worker reports that it cannot serve."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            self._give_up(worker, reason)

    # What is done to workers.

    def tick(self) -> None:
        """Do what time, load and the workers' calls ask for. To be called a few times a second."""
        now = self._clock()
        self._queue.expire()
        self.refresh()
        for worker in list(self._workers.values()):
            self._watch(worker, now)
        for worker_id in self._queue.disobedient():
            if worker_id in self._workers:
                self.stop(worker_id, "did not stop a job that it was told to stop")
        if self._closing or not self._settings.command:
            return
        members = [
            Member(worker.id, worker.state, worker.since, worker.started_at)
            for worker in self._workers.values()
            if worker.process is not None or worker.state is WorkerState.THROTTLED
        ]
        decision = decide(self._settings, self._queue.load(), members, now)
        for worker_id in decision.overdue:
            self._give_up(self._workers[worker_id], f"not ready after {self._settings.start_limit_s:g} s")
        for worker_id in decision.stop:
            self.stop(worker_id, f"idle for {self._settings.idle_timeout_s:g} s")
        if now >= self._start_after:
            for _ in range(decision.start):
                self._add(now)

    def refresh(self) -> None:
        """Bring running and idle workers' states up to what the queue says."""
        for worker in self._workers.values():
            if worker.state in (WorkerState.IDLE, WorkerState.RUNNING):
                state = WorkerState.RUNNING if self._queue.held(worker.id) else WorkerState.IDLE
                if state is not worker.state:
                    self._set(worker, state)

    def stop(self, worker_id: str, reason: str) -> None:
        """Ask a worker to end; it is killed when its grace is over."""
        worker = self._workers[worker_id]
        if worker.state is WorkerState.STOPPING:
            return
        self._set(worker, WorkerState.STOPPING)
        worker.reason = reason
        self._listener.event(f"worker {worker_id} stopping: {reason}")
        if worker.process is None:
            self._leave(worker)
        else:
            worker.kill_at = self._clock() + self._settings.grace_s
            worker.process.terminate()
        self._listener.worker_stopping(worker_id)

    def kill(self, worker_id: str) -> None:
        """Kill a worker, as a machine that fails would.

        Raises:
            NotFoundError: there is no such worker with a process of ours.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.process is None:
            raise NotFoundError(f"there is no worker {worker_id} that was started here")
        self._listener.event(f"worker {worker_id} killed")
        worker.process.kill()

    def close(self) -> None:
        """Stop all workers and start none; `empty` tells when they are gone."""
        self._closing = True
        for worker_id in list(self._workers):
            self.stop(worker_id, "the emulator ends")

    @property
    def empty(self) -> bool:
        """Whether no process of ours is left."""
        return not any(worker.process is not None for worker in self._workers.values())

    @property
    def over(self) -> bool:
        """Whether it has been closed and nothing is left."""
        return self._closing and self.empty

    def kill_all(self) -> None:
        """Kill every worker now."""
        for worker in self._workers.values():
            if worker.process is not None:
                worker.process.kill()

    # What others see.

    def workers(self) -> list[Worker]:
        """All that are there, in the order of their start."""
        self.refresh()
        return list(self._workers.values())

    def gone(self) -> list[Worker]:
        """The last that have ended, newest first."""
        return list(reversed(self._gone))

    def health(self) -> dict[str, int]:
        """The `workers` of /health. `ready` counts those that could take a job at once, which is `idle` again."""
        states = [worker.state for worker in self.workers()]
        counts = {
            state.value: states.count(state)
            for state in (
                WorkerState.IDLE,
                WorkerState.INITIALIZING,
                WorkerState.RUNNING,
                WorkerState.THROTTLED,
                WorkerState.UNHEALTHY,
            )
        }
        return {**counts, "ready": counts["idle"]}

    def _watch(self, worker: Worker, now: float) -> None:
        """What becomes of one worker as time goes by."""
        silent_s = now - worker.seen_at
        if worker.state is WorkerState.THROTTLED and self._throttled() > self._faults.throttled_workers:
            del self._workers[worker.id]
        elif worker.state is WorkerState.UNHEALTHY and worker.process is None and now >= self._start_after:
            self._leave(worker)
        elif worker.kill_at is not None and now >= worker.kill_at and worker.process is not None and not worker.killed:
            worker.killed = True
            self._listener.event(f"worker {worker.id} killed: still there {self._settings.grace_s:g} s after SIGTERM")
            worker.process.kill()
        elif worker.polled and worker.state in ACTIVE and silent_s >= self._settings.lost_after_s:
            if worker.process is None:
                self._listener.event(f"worker {worker.id} lost: silent for {silent_s:.0f} s")
                self._leave(worker)
            else:
                self._give_up(worker, f"silent for {silent_s:.0f} s")

    def _throttled(self) -> int:
        return sum(worker.state is WorkerState.THROTTLED for worker in self._workers.values())

    def _add(self, now: float) -> None:
        """Start a worker, or put a throttled one in its place."""
        worker_id = "".join(random.SystemRandom().choices(string.ascii_lowercase + string.digits, k=_ID_LETTERS))
        throttled = self._throttled() < self._faults.throttled_workers
        state = WorkerState.THROTTLED if throttled else WorkerState.INITIALIZING
        worker = Worker(worker_id, state, now, now, now)
        self._workers[worker_id] = worker
        if throttled:
            self._listener.event(f"worker {worker_id} throttled")
            return
        settings = self._settings
        # The emulator's own RUNPOD_* variables are another platform's.
        env = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_WEBHOOK")}
        env |= worker_environment(self._base_url, settings.id, worker_id, self._worker_key, settings.ping_interval_ms)
        env |= self._ca_environment
        try:
            worker.process = self._start(settings.command, env | settings.env, settings.cwd, _Watcher(self, worker))
        except OSError as error:
            worker.log.append(f"{settings.command[0]} cannot be started: {error.strerror}")
            self._failed(worker, "cannot be started")
            return
        self._listener.event(f"worker {worker_id} started")

    def _give_up(self, worker: Worker, reason: str) -> None:
        """A worker that does not serve: its jobs go back, its process is killed."""
        if worker.state is WorkerState.UNHEALTHY:
            return
        self._failed(worker, reason)
        self._queue.worker_lost(worker.id)
        if worker.process is not None:
            worker.process.kill()

    def _failed(self, worker: Worker, reason: str) -> None:
        self._failures += 1
        self._start_after = self._clock() + min(_MAX_BACKOFF_S, 2.0 ** (self._failures - 1))
        worker.reason = reason
        self._set(worker, WorkerState.UNHEALTHY)
        self._listener.event(f"worker {worker.id} unhealthy: {reason}")

    def logged(self, worker: Worker, line: str) -> None:
        """A worker's process has written a line."""
        line = self._redaction.apply(line)
        worker.log.append(line)
        self._listener.worker_logged(worker.id, line)

    def exited(self, worker: Worker, code: int) -> None:
        """A worker's process has ended."""
        worker.process = None
        worker.exit_code = code
        self._queue.worker_lost(worker.id)
        expected = worker.state is WorkerState.STOPPING or (code == 0 and worker.polled)
        self._listener.event(f"worker {worker.id} exited with {code}")
        if not expected and worker.state is not WorkerState.UNHEALTHY:
            self._failed(worker, f"exited with {code}")
        if expected or self._closing:
            self._leave(worker)

    def _leave(self, worker: Worker) -> None:
        worker.ended_at = self._clock()
        self._queue.worker_lost(worker.id)
        if self._workers.pop(worker.id, None) is not None:
            self._gone.append(worker)

    def _set(self, worker: Worker, state: WorkerState) -> None:
        worker.state = state
        worker.since = self._clock()


class _Watcher:
    """Passes what a worker's process does to its fleet."""

    def __init__(self, fleet: Fleet, worker: Worker) -> None:
        self._fleet = fleet
        self._worker = worker

    def logged(self, line: str) -> None:
        self._fleet.logged(self._worker, line)

    def exited(self, code: int) -> None:
        self._fleet.exited(self._worker, code)
