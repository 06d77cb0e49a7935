"""Fakes for the emulator's tests: clock, queue listener, worker process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emulator.core.job import Job, Policy, Submission
from emulator.core.job_queue import JobQueue, QueueSettings
from emulator.core.process import ProcessListener


class FakeClock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class RecordingListener:
    """A queue listener that records its notifications."""

    topics: list[str] = field(default_factory=list)
    ended_jobs: list[str] = field(default_factory=list)

    def on_change(self, topic: str) -> None:
        self.topics.append(topic)

    def on_job_ended(self, job: Job) -> None:
        self.ended_jobs.append(job.id)


@dataclass(eq=False)
class FakeProcess:
    """A process that records signals; the test calls the listener."""

    command: Sequence[str]
    env: Mapping[str, str]
    cwd: str | None
    listener: ProcessListener
    pid: int | None = 1
    terminated: bool = False
    killed: bool = False
    frozen: bool = False

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False

    def terminate(self) -> None:
        self.terminated = True

    def kill(self) -> None:
        self.killed = True


def submission(job_input: Any = "hello", **policy: Any) -> Submission:
    return Submission(input=job_input, policy=Policy.model_validate(policy))


def queue(clock: FakeClock, **settings: Any) -> JobQueue:
    return JobQueue(QueueSettings(**settings), clock, RecordingListener())


def submit(jobs: JobQueue, job_input: Any = "hello", retention_s: float = 1800.0, **policy: Any) -> Job:
    return jobs.submit(submission(job_input, **policy), retention_s=retention_s)
