"""The queue of one service: a state machine without I/O, threads or a clock of its own.

    submit ──▶ waiting ──take──▶ running ──ack──▶ ended
                  ▲ │                │
                  │ └─ cancel, clean ┼─────────▶ ended (failed)
                  └── worker lost ───┘ (after max_retries: ended, without an answer)

Unlike a job of RunPod, a task ends with its worker's acknowledgement, whatever happened to its answer; it is leased to
its worker as long as heartbeats name it; its time to live is the worker's to check; and anybody may answer it, of whom
the first is heard.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from emulator.core.work import QueueLoad
from emulator.errors import NotFoundError
from emulator.spirit.task import Answer, Mode, Task, TaskStatus

# Looking for expired results visits every task that is kept.
_CLEANUP_INTERVAL_S = 1.0

TASKS_QUEUED_TOPIC = "tasks-queued"
"""The topic that changes when a task enters the queue."""


def task_topic(task_id: str) -> str:
    """Return the topic that changes with one task."""
    return f"task/{task_id}"


class TaskListener(Protocol):
    """Is notified of what happens in a queue."""

    def on_change(self, topic: str) -> None:
        """Handle a change of what the topic stands for."""


@dataclass(frozen=True)
class TaskQueueSettings:
    """Settings of a queue.

    Args:
        lost_after_s: a task that its worker has not reported for this long is lost.
        max_retries: how many times a lost task is queued again; 0: it is not.
        retention_s: how long a task is kept after its end.
    """

    lost_after_s: float = 20.0
    max_retries: int = 1
    retention_s: float = 1800.0


class TaskQueue:
    """The tasks of one service.

    Args:
        settings: settings of the queue.
        clock: monotonic time in seconds.
        wall_clock: seconds since 1970.
        listener: is notified of changes.
    """

    def __init__(
        self,
        settings: TaskQueueSettings,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        listener: TaskListener,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._wall_clock = wall_clock
        self._listener = listener
        self._tasks: dict[str, Task] = {}
        self._waiting: deque[Task] = deque()
        # By worker, then by task id.
        self._running: dict[str, dict[str, Task]] = {}
        self._sequences = count(1)
        self._next_cleanup_at = 0.0
        self._completed = self._failed = self._retried = 0

    # Operations of the gateway.

    def submit(self, mode: Mode, kind: str, body: bytes, ttl_s: float, webhook: str = "") -> Task:
        """Queue a task."""
        now = self._clock()
        task = Task(
            id=str(uuid.uuid4()),
            sequence=next(self._sequences),
            mode=mode,
            kind=kind,
            body=body,
            webhook=webhook,
            submitted_at=now,
            created_ms=round(self._wall_clock() * 1000),
            ttl_ms=round(ttl_s * 1000),
            retention_s=self._settings.retention_s,
            queued_at=now,
        )
        self._tasks[task.id] = task
        self._waiting.append(task)
        self._listener.on_change(TASKS_QUEUED_TOPIC)
        return task

    def task(self, task_id: str) -> Task | None:
        """Return the task with this id; None if there is none, or its retention has ended."""
        return self._tasks.get(task_id)

    def cancel(self, task_id: str, sequence: int) -> None:
        """Remove an async task that waits; a running one cannot be reached.

        Raises:
            NotFoundError: no async task that waits has this id and sequence.
        """
        task = self._tasks.get(task_id)
        if task not in self._waiting or task is None or task.mode != "async" or task.sequence != sequence:
            raise NotFoundError(f"no async request {task_id} is queued")
        self._remove_waiting(task, "canceled")

    def clean(self) -> list[str]:
        """Remove all async tasks that wait; return their ids."""
        tasks = [task for task in self._waiting if task.mode == "async"]
        for task in tasks:
            self._remove_waiting(task, "cleaned")
        return [task.id for task in tasks]

    # Operations of agents. One that names an unknown task does nothing: it may have been removed.

    def take(self, worker: str) -> Task | None:
        """Assign the first task that waits to a worker, even if its time to live is over: the worker answers that."""
        if not self._waiting:
            return None
        task = self._waiting.popleft()
        task.worker = worker
        task.taken_at = task.last_seen_at = self._clock()
        self._running.setdefault(worker, {})[task.id] = task
        self._notify(task)
        return task

    def heartbeat(self, worker: str, task_ids: Iterable[str]) -> None:
        """Extend the lease of these tasks of a worker."""
        for task_id in set(task_ids) & self._running.get(worker, {}).keys():
            self._running[worker][task_id].last_seen_at = self._clock()

    def metric(self, task_id: str, status: TaskStatus, message: str) -> None:
        """Set the state that `/status` shows."""
        task = self._tasks.get(task_id)
        if task is not None:
            task.status, task.message = status, message
            self._notify(task)

    def begin_answer(self, worker: str, task_id: str, route: str, status: int) -> Task | None:
        """Record an answer; return its task if it is the first one, None if nobody hears it."""
        task = self._tasks.get(task_id)
        if task is None:
            return None
        task.answers.append(Answer(route, worker, status))
        if task.result_status is not None:
            return None
        task.result_status = status
        return task

    def add_output(self, task: Task) -> None:
        """Count a piece of a task's answer."""
        task.output_count += 1
        if task.first_output_at is None:
            task.first_output_at = self._clock()
        self._notify(task)

    def set_result(self, task: Task, message: str, result: bytes | None) -> None:
        """Keep a task's result, and why there is none if it is None."""
        task.result = result
        if message:
            task.message = message
        self.add_output(task)

    def ack(self, task_id: str) -> None:
        """End a task, wherever it is: "after receive ack, agent will delete request" (the SDK's `manager.py`)."""
        task = self._tasks.get(task_id)
        if task is None or task.ended_at is not None:
            return
        task.acked = True
        if task in self._waiting:
            self._waiting.remove(task)
        self._end(task)

    def on_worker_lost(self, worker: str) -> None:
        """Return a lost worker's tasks to the head of the queue, in their order, or lose them."""
        for task in reversed(self.running_jobs(worker)):
            self._requeue_or_lose(task)

    # Time-outs and counts.

    def expire(self) -> None:
        """Queue tasks whose lease is over again, and remove expired results."""
        now = self._clock()
        running = [task for tasks in self._running.values() for task in tasks.values()]
        for task in reversed(running):
            if now - task.last_seen_at >= self._settings.lost_after_s:
                self._requeue_or_lose(task)
        if now >= self._next_cleanup_at:
            self._next_cleanup_at = now + _CLEANUP_INTERVAL_S
            ended = [task for task in self._tasks.values() if task.ended_at is not None]
            for task in ended:
                if task.ended_at is not None and task.ended_at + task.retention_s <= now:
                    del self._tasks[task.id]

    def running_jobs(self, worker: str) -> list[Task]:
        """Return the tasks that are assigned to a worker."""
        return list(self._running.get(worker, {}).values())

    def unresponsive_workers(self) -> set[str]:
        """Return nobody: a worker is never asked to stop a task."""
        return set()

    def recent(self, count: int) -> list[Task]:
        """Return the tasks that were submitted last, newest first."""
        return list(reversed(list(self._tasks.values())[-count:]))

    @property
    def in_queue(self) -> int:
        """Number of waiting tasks."""
        return len(self._waiting)

    @property
    def in_progress(self) -> int:
        """Number of running tasks."""
        return sum(map(len, self._running.values()))

    def load(self) -> QueueLoad:
        """Return the input of the autoscaler."""
        now = self._clock()
        longest = max((now - task.queued_at for task in self._waiting), default=0.0)
        return QueueLoad(len(self._waiting), self.in_progress, longest)

    def health(self) -> dict[str, int]:
        """Return counts of tasks."""
        return {
            "completed": self._completed,
            "failed": self._failed,
            "inProgress": self.in_progress,
            "inQueue": self.in_queue,
            "retried": self._retried,
        }

    def close(self) -> None:
        """End all tasks."""
        for task in [task for task in self._tasks.values() if task.ended_at is None]:
            self._fail(task, "the emulator is shutting down")

    def _remove_waiting(self, task: Task, message: str) -> None:
        self._waiting.remove(task)
        self._fail(task, message)

    def _requeue_or_lose(self, task: Task) -> None:
        """Handle a task whose worker is lost, or no longer reports it."""
        if task.retries >= self._settings.max_retries:
            self._fail(task, "lost with its worker")
            return
        self._unassign(task)
        task.retries += 1
        self._retried += 1
        task.queued_at, task.worker, task.taken_at = self._clock(), None, None
        self._waiting.appendleft(task)
        self._notify(task)
        self._listener.on_change(TASKS_QUEUED_TOPIC)

    def _fail(self, task: Task, message: str) -> None:
        task.status, task.message = TaskStatus.FAILED, message
        self._end(task)

    def _end(self, task: Task) -> None:
        """End a task; the only place that does."""
        self._unassign(task)
        task.ended_at = self._clock()
        if task.status is TaskStatus.FAILED:
            self._failed += 1
        else:
            self._completed += 1
        self._notify(task)

    def _unassign(self, task: Task) -> None:
        jobs = self._running.get(task.worker or "", {})
        jobs.pop(task.id, None)
        if not jobs:
            self._running.pop(task.worker or "", None)

    def _notify(self, task: Task) -> None:
        self._listener.on_change(task_topic(task.id))
