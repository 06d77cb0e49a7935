"""The workers of one endpoint: started and stopped as the autoscaler decides, and monitored."""

from __future__ import annotations

import os
import random
import string
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from emulator.core.autoscaler import decide
from emulator.core.faults import Faults
from emulator.core.process import StartProcess
from emulator.core.work import WorkQueue
from emulator.core.worker import ACTIVE_STATES, TAKING_STATES, FleetWorker, WorkerState
from emulator.errors import NotFoundError
from emulator.redaction import Redaction
from emulator.settings import FleetSettings

_MAX_EXITED_WORKERS = 10
_MAX_LINE_CHARACTERS = 4000
_ID_LETTERS = 14
# "The system automatically retries with exponential backoff."
_MAX_BACKOFF_S = 60.0
_PLATFORM_VARIABLES = ("RUNPOD_WEBHOOK", "EASE_AGENT_URL")


class FleetListener(Protocol):
    """Is notified of what happens in a fleet."""

    def on_event(self, line: str) -> None:
        """Handle an event for the endpoint's timeline."""

    def on_worker_log(self, worker: str, line: str) -> None:
        """Handle a worker's log line, which has no secrets in it."""

    def on_worker_stopping(self, worker: str) -> None:
        """Handle a worker that was asked to stop: its long polls must end."""

    def on_worker_exited(self, worker: str) -> None:
        """Handle a worker whose process has exited."""

    def on_worker_frozen(self, worker: str, *, drops_connections: bool) -> None:
        """Handle a worker that was frozen: where the platform drops its connections, they must be closed."""

    def on_worker_thawed(self, worker: str) -> None:
        """Handle a worker that was thawed: a long poll that was kept may be given jobs again."""


class Fleet:
    """Keeps as many workers as the endpoint's settings ask for.

    Managed workers are processes that the fleet has started. External workers are any others that ask for jobs.

    Args:
        settings: settings of the endpoint.
        queue: jobs of the endpoint.
        listener: is notified of events.
        environment: returns the variables by which the worker with this id finds the platform.
        clock: monotonic time in seconds.
        start: starts a process.
        faults: how many workers are throttled.
        redaction: removes secrets from log lines.
    """

    def __init__(  # noqa: PLR0913 (all collaborators, so that a test can replace each)
        self,
        settings: FleetSettings,
        queue: WorkQueue,
        listener: FleetListener,
        *,
        environment: Callable[[str], Mapping[str, str]],
        clock: Callable[[], float],
        start: StartProcess,
        faults: Faults,
        redaction: Redaction,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._listener = listener
        self._environment = environment
        self._clock = clock
        self._start = start
        self._faults = faults
        self._redaction = redaction
        self._version = 1
        self._replacements = 0
        self._workers: dict[str, FleetWorker] = {}
        self._exited: deque[FleetWorker] = deque(maxlen=_MAX_EXITED_WORKERS)
        self._consecutive_failures = 0
        self._backoff_until = 0.0
        self._closing = False

    # Requests of workers.

    def on_poll(self, worker_id: str) -> FleetWorker:
        """Record that a worker asks for jobs; an unknown one is registered as an external worker.

        Raises:
            NotFoundError: it is unknown, and the emulator is shutting down.
        """
        worker = self._workers.get(worker_id)
        now = self._clock()
        if worker is None:
            if self._closing:
                raise NotFoundError("the emulator is shutting down")
            worker = FleetWorker(worker_id, WorkerState.IDLE, now, now, now, reason="started externally")
            self._workers[worker_id] = worker
            self._listener.on_event(f"worker {worker_id} registered: started externally")
        worker.last_seen_at = now
        if worker.ready_at is None:
            worker.ready_at = now
            self._consecutive_failures = 0
            if worker.state is WorkerState.INITIALIZING:
                self._set_state(worker, WorkerState.IDLE)
                self._listener.on_event(f"worker {worker_id} ready after {now - worker.started_at:.1f} s")
        return worker

    def touch(self, worker_id: str) -> None:
        """Record that a worker sent a request."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.last_seen_at = self._clock()

    def is_stopping(self, worker_id: str) -> bool:
        """Return whether the worker was asked to stop, or is unknown."""
        worker = self._workers.get(worker_id)
        return worker is None or worker.state is WorkerState.STOPPING

    def is_managed(self, worker_id: str) -> bool:
        """Return whether the worker runs in a process that the fleet has started."""
        worker = self._workers.get(worker_id)
        return worker is not None and worker.process is not None

    def on_answer(self, worker_id: str) -> None:
        """Record that a worker has delivered an output or a result."""
        worker = self._workers.get(worker_id)
        if worker is not None and worker.restored_at is not None:
            answer_s = self._clock() - worker.restored_at
            worker.restored_at = None
            self._listener.on_event(f"worker {worker_id} answered {answer_s:.3f} s after it was restored")

    def on_unhealthy(self, worker_id: str, reason: str) -> None:
        """Handle a worker's report that it cannot serve."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            self._fail(worker, reason)

    # Control of workers.

    def update(self, settings: FleetSettings, redaction: Redaction, version: int) -> None:
        """Apply other settings.

        With another version, all present workers become stale: each is given no more jobs, and replaced when it runs
        none.
        """
        self._settings, self._redaction = settings, redaction
        if version != self._version:
            self._version = version
            # What failed with the last version says nothing about this one.
            self._consecutive_failures, self._backoff_until = 0, 0.0
            for worker in self._workers.values():
                worker.is_stale = worker.version is not None

    def tick(self) -> None:
        """Apply time-outs and the autoscaler's decision; to be called several times a second."""
        now = self._clock()
        self._queue.expire()
        self.refresh_states()
        for worker in list(self._workers.values()):
            self._check(worker, now)
            if worker.is_stale:
                self._replace(worker)
        for worker_id in self._queue.unresponsive_workers():
            if worker_id in self._workers:
                self.stop(worker_id, "ignored a stop signal")
        if self._settings.command and not self._closing:
            self._scale(now)

    def _scale(self, now: float) -> None:
        """Apply the autoscaler's decision, and replace stale workers that were stopped."""
        own = [
            worker
            for worker in self._workers.values()
            if (worker.process is not None and (worker.state is not WorkerState.FROZEN or worker.is_held))
            or worker.state is WorkerState.THROTTLED
        ]
        decision = decide(self._settings, self._queue.load(), own, now)
        for worker_id in decision.init_timed_out:
            self._fail(self._workers[worker_id], f"not ready after {self._settings.effective_init_timeout_s:g} s")
        for worker_id in decision.stop:
            self._scale_down(self._workers[worker_id], f"idle for {self._settings.idle_timeout_s:g} s")
        replacements = min(self._replacements, self._settings.workers_max - len(own))
        for _ in range(max(decision.start, replacements)):
            if (frozen := self._last_frozen()) is not None:
                self.thaw(frozen.id)
            elif now >= self._backoff_until:
                self._start_worker(now)

    def _replace(self, worker: FleetWorker) -> None:
        """Stop a stale worker that runs no job; another is started as soon as `workersMax` allows."""
        if worker.process is None:
            self._remove(worker)  # It is throttled, or has failed.
        elif worker.state in ACTIVE_STATES and not self._queue.running_jobs(worker.id):
            self.stop(worker.id, f"replaced by version {self._version}")
            self._replacements += 1
        elif worker.state is WorkerState.FROZEN and not worker.is_held:
            self.stop(worker.id, f"frozen with a version before {self._version}")

    def _scale_down(self, worker: FleetWorker, reason: str) -> None:
        """Stop a worker, or freeze it with FlashBoot."""
        if self._settings.flashboot and worker.state is WorkerState.IDLE:
            self.freeze(worker.id, reason)
        else:
            self.stop(worker.id, reason)

    def _last_frozen(self) -> FleetWorker | None:
        """Return the worker that FlashBoot froze last, if there is one."""
        frozen = [one for one in self._workers.values() if one.state is WorkerState.FROZEN and not one.is_held]
        return max(frozen, key=lambda worker: worker.state_since, default=None)

    def refresh_states(self) -> None:
        """Set workers to running or idle, as the queue says."""
        for worker in self._workers.values():
            if worker.state in TAKING_STATES:
                state = WorkerState.RUNNING if self._queue.running_jobs(worker.id) else WorkerState.IDLE
                if state is not worker.state:
                    self._set_state(worker, state)

    def stop(self, worker_id: str, reason: str) -> None:
        """Ask a worker to stop; it is killed after its grace period."""
        worker = self._workers[worker_id]
        if worker.state is WorkerState.STOPPING:
            return
        was_frozen = worker.state is WorkerState.FROZEN
        self._set_state(worker, WorkerState.STOPPING)
        worker.reason = reason
        self._listener.on_event(f"worker {worker_id} stopping: {reason}")
        if worker.process is None:
            self._remove(worker)
        elif was_frozen:
            # Nothing of it runs that could react to SIGTERM.
            worker.process.kill()
        else:
            worker.kill_at = self._clock() + self._settings.grace_s
            worker.process.terminate()
        self._listener.on_worker_stopping(worker_id)

    def kill(self, worker_id: str) -> None:
        """Kill a managed worker, to simulate the failure of its machine.

        Raises:
            NotFoundError: there is no such managed worker.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.process is None:
            raise NotFoundError(f"there is no managed worker {worker_id}")
        self._listener.on_event(f"worker {worker_id} killed")
        worker.process.kill()

    def freeze(self, worker_id: str, reason: str, *, drops_connections: bool = True, is_held: bool = False) -> None:
        """Freeze a managed worker, as FlashBoot does: its processes stop where they are.

        Args:
            worker_id: id of the worker.
            reason: for the timeline.
            drops_connections: whether its connections end, too.
            is_held: whether only `thaw` ends it, not the autoscaler.

        Raises:
            NotFoundError: there is no such managed worker, or it is ending or frozen already.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.process is None or worker.process.pid is None or worker.state not in ACTIVE_STATES:
            raise NotFoundError(f"there is no managed worker {worker_id} that runs")
        worker.is_held, worker.restored_at = is_held, None
        self._set_state(worker, WorkerState.FROZEN)
        self._listener.on_event(f"worker {worker_id} frozen: {reason}")
        worker.process.freeze()
        self._listener.on_worker_frozen(worker_id, drops_connections=drops_connections)

    def thaw(self, worker_id: str) -> None:
        """Let a frozen worker go on.

        Raises:
            NotFoundError: there is no such frozen worker.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.process is None or worker.state is not WorkerState.FROZEN:
            raise NotFoundError(f"there is no frozen worker {worker_id}")
        now = self._clock()
        self._listener.on_event(f"worker {worker_id} restored after {now - worker.state_since:.1f} s")
        worker.is_held, worker.last_seen_at, worker.restored_at = False, now, now
        self._set_state(worker, WorkerState.INITIALIZING if worker.ready_at is None else WorkerState.IDLE)
        worker.process.thaw()
        self._listener.on_worker_thawed(worker_id)

    def close(self, reason: str = "the emulator is shutting down") -> None:
        """Stop all workers and start no more; `is_empty` is true when they have exited."""
        self._closing = True
        for worker_id in list(self._workers):
            self.stop(worker_id, reason)

    @property
    def is_empty(self) -> bool:
        """Whether no managed worker is left."""
        return not any(worker.process is not None for worker in self._workers.values())

    def kill_all(self) -> None:
        """Kill every managed worker now."""
        for worker in self._workers.values():
            if worker.process is not None:
                worker.process.kill()

    # State of workers.

    def workers(self) -> list[FleetWorker]:
        """Return all current workers, in the order of their start."""
        self.refresh_states()
        return list(self._workers.values())

    def exited_workers(self) -> list[FleetWorker]:
        """Return the workers that exited last, newest first."""
        return list(reversed(self._exited))

    def health(self) -> dict[str, int]:
        """Return the `workers` of /health; `ready`, the workers that could take a job at once, equals `idle`."""
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

    def _check(self, worker: FleetWorker, now: float) -> None:
        """Apply the time-outs of one worker."""
        silent_s = now - worker.last_seen_at
        if worker.state is WorkerState.THROTTLED and self._throttled_count() > self._faults.throttled_workers:
            del self._workers[worker.id]
        elif worker.state is WorkerState.UNHEALTHY and worker.process is None and now >= self._backoff_until:
            self._remove(worker)
        elif (
            worker.state is WorkerState.FROZEN
            and not worker.is_held
            and now - worker.state_since >= self._settings.frozen_timeout_s
        ):
            self.stop(worker.id, f"frozen for {self._settings.frozen_timeout_s:g} s")
        elif worker.kill_at is not None and now >= worker.kill_at and worker.process is not None:
            worker.kill_at = None
            self._listener.on_event(
                f"worker {worker.id} killed: still running {self._settings.grace_s:g} s after SIGTERM"
            )
            worker.process.kill()
        elif worker.ready_at is not None and worker.state in ACTIVE_STATES and silent_s >= self._settings.lost_after_s:
            if worker.process is None:
                self._listener.on_event(f"worker {worker.id} lost: no request for {silent_s:.0f} s")
                self._remove(worker)
            else:
                self._fail(worker, f"no request for {silent_s:.0f} s")

    def _throttled_count(self) -> int:
        return sum(worker.state is WorkerState.THROTTLED for worker in self._workers.values())

    def _start_worker(self, now: float) -> None:
        """Start a worker, or add a throttled one without a process."""
        self._replacements = max(0, self._replacements - 1)
        worker_id = "".join(random.SystemRandom().choices(string.ascii_lowercase + string.digits, k=_ID_LETTERS))
        throttled = self._throttled_count() < self._faults.throttled_workers
        state = WorkerState.THROTTLED if throttled else WorkerState.INITIALIZING
        worker = FleetWorker(worker_id, state, now, now, now, version=self._version)
        self._workers[worker_id] = worker
        if throttled:
            self._listener.on_event(f"worker {worker_id} throttled")
            return
        settings = self._settings
        # These variables in the emulator's own environment belong to another platform.
        env = {name: value for name, value in os.environ.items() if not name.startswith(_PLATFORM_VARIABLES)}
        try:
            env |= self._environment(worker_id)
            worker.process = self._start(
                settings.command, env | settings.env, settings.cwd, _FleetProcessListener(self, worker)
            )
        except (OSError, ValueError) as error:  # ValueError: a variable's name or value is not valid.
            self._listener.on_worker_exited(worker_id)
            worker.log.append(f"{settings.command[0]} cannot be started: {error}")
            self._mark_unhealthy(worker, "cannot be started")
            return
        self._listener.on_event(f"worker {worker_id} started")

    def _fail(self, worker: FleetWorker, reason: str) -> None:
        """Mark a worker as unhealthy, requeue its jobs and kill its process."""
        if worker.state is WorkerState.UNHEALTHY:
            return
        self._mark_unhealthy(worker, reason)
        self._queue.on_worker_lost(worker.id)
        if worker.process is not None:
            worker.process.kill()

    def _mark_unhealthy(self, worker: FleetWorker, reason: str) -> None:
        self._consecutive_failures += 1
        self._backoff_until = self._clock() + min(_MAX_BACKOFF_S, 2.0 ** (self._consecutive_failures - 1))
        worker.reason = reason
        self._set_state(worker, WorkerState.UNHEALTHY)
        self._listener.on_event(f"worker {worker.id} unhealthy: {reason}")

    def on_log_line(self, worker: FleetWorker, line: str) -> None:
        """Keep a line that a worker's process wrote."""
        # Cut only what is redacted: the cut may split a secret.
        line = self._redaction.apply(line)[:_MAX_LINE_CHARACTERS]
        worker.log.append(line)
        self._listener.on_worker_log(worker.id, line)

    def on_exit(self, worker: FleetWorker, code: int) -> None:
        """Handle the exit of a worker's process."""
        worker.process = None
        worker.exit_code = code
        self._listener.on_worker_exited(worker.id)
        self._queue.on_worker_lost(worker.id)
        expected = worker.state is WorkerState.STOPPING or (code == 0 and worker.ready_at is not None)
        self._listener.on_event(f"worker {worker.id} exited with {code}")
        if not expected and worker.state is not WorkerState.UNHEALTHY:
            self._mark_unhealthy(worker, f"exited with {code}")
        if expected or self._closing:
            self._remove(worker)

    def _remove(self, worker: FleetWorker) -> None:
        worker.exited_at = self._clock()
        self._queue.on_worker_lost(worker.id)
        if self._workers.pop(worker.id, None) is not None:
            self._exited.append(worker)

    def _set_state(self, worker: FleetWorker, state: WorkerState) -> None:
        worker.state = state
        worker.state_since = self._clock()


class _FleetProcessListener:
    """Forwards the events of one worker's process to its fleet."""

    def __init__(self, fleet: Fleet, worker: FleetWorker) -> None:
        self._fleet = fleet
        self._worker = worker

    def on_log_line(self, line: str) -> None:
        self._fleet.on_log_line(self._worker, line)

    def on_exit(self, code: int) -> None:
        self._fleet.on_exit(self._worker, code)
