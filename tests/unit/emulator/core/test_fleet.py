"""The workers of an endpoint, with fake processes and a fake clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from emulator.core.faults import Faults, FaultSettings
from emulator.core.fleet import Fleet
from emulator.core.job import JobStatus
from emulator.core.job_queue import JobQueue
from emulator.core.process import ProcessListener
from emulator.core.worker import TAKING_STATES, FleetWorker, WorkerState
from emulator.errors import NotFoundError
from emulator.redaction import Redaction
from emulator.settings import EndpointSettings
from tests.unit.emulator.fakes import FakeClock, FakeProcess, RecordingListener, submit


class FleetHarness:
    """A fleet with fake processes and a fake clock; also its listener."""

    def __init__(self, **settings: Any) -> None:
        self.clock = FakeClock()
        self.settings = EndpointSettings.model_validate(
            {"command": "worker --fast", "workersMax": 2, "scalerType": "REQUEST_COUNT", "scalerValue": 1, **settings}
        )
        self.queue = JobQueue(self.settings.queue_settings(), self.clock, RecordingListener())
        self.processes: list[FakeProcess] = []
        self.faults = Faults()
        self.events: list[str] = []
        self.log_lines: list[tuple[str, str]] = []
        self.stopping: list[str] = []
        self.exited: list[str] = []
        self.frozen: list[tuple[str, bool]] = []
        self.thawed: list[str] = []
        self.fleet = Fleet(
            self.settings,
            self.queue,
            self,
            environment=self.environment,
            clock=self.clock,
            start=self.start,
            faults=self.faults,
            redaction=Redaction({"HF_TOKEN": "hf_very_secret"}, ()),
        )

    def on_event(self, line: str) -> None:
        self.events.append(line)

    def on_worker_log(self, worker: str, line: str) -> None:
        self.log_lines.append((worker, line))

    def on_worker_stopping(self, worker: str) -> None:
        self.stopping.append(worker)

    def on_worker_exited(self, worker: str) -> None:
        self.exited.append(worker)

    def on_worker_frozen(self, worker: str, *, drops_connections: bool) -> None:
        self.frozen.append((worker, drops_connections))

    def on_worker_thawed(self, worker: str) -> None:
        self.thawed.append(worker)

    def environment(self, worker: str) -> dict[str, str]:
        return {"WORKER": worker, "OVERRIDDEN": "by-platform"}

    def start(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str | None, listener: ProcessListener
    ) -> FakeProcess:
        process = FakeProcess(command, env, cwd, listener)
        self.processes.append(process)
        return process

    def ready_worker(self) -> FleetWorker:
        """Submit a job, and return the worker that was started for it, ready."""
        submit(self.queue)
        self.fleet.tick()
        return self.fleet.on_poll(self.fleet.workers()[-1].id)

    def run_workers(self, job_s: float) -> None:
        """Act as all workers: become ready, run one job at a time for `job_s`, and exit after SIGTERM."""
        for worker in self.fleet.workers():
            if isinstance(worker.process, FakeProcess) and worker.process.terminated:
                worker.process.listener.on_exit(0)
                continue
            self.fleet.on_poll(worker.id)
            for job in self.queue.running_jobs(worker.id):
                if self.clock.now - (job.taken_at or 0) >= job_s:
                    self.queue.finish(worker.id, job.id, "done")
            if not self.queue.running_jobs(worker.id):
                self.queue.take(worker.id, 1)

    def advance(self, seconds: float) -> None:
        self.clock.now += seconds
        self.fleet.tick()


def test_a_worker_is_started_with_the_platforms_and_its_endpoints_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An endpoint's own variables come last; those of another platform in the emulator's environment are left out."""
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "https://elsewhere")
    monkeypatch.setenv("EASE_AGENT_URL", "http://elsewhere")
    harness = FleetHarness(env={"MODEL_NAME": "tiny", "OVERRIDDEN": "by-endpoint"}, cwd="/srv")
    worker = harness.ready_worker()
    (process,) = harness.processes
    assert (process.command, process.cwd) == (("worker", "--fast"), "/srv")
    assert (process.env["WORKER"], process.env["OVERRIDDEN"], process.env["MODEL_NAME"]) == (
        worker.id,
        "by-endpoint",
        "tiny",
    )
    assert not {"RUNPOD_WEBHOOK_GET_JOB", "EASE_AGENT_URL"} & process.env.keys()


def test_a_worker_is_initializing_then_idle_then_running_then_idle() -> None:
    harness = FleetHarness()
    job = submit(harness.queue)
    harness.fleet.tick()
    assert harness.fleet.health()["initializing"] == 1
    (worker,) = harness.fleet.workers()
    harness.fleet.on_poll(worker.id)
    assert harness.fleet.health() == {
        "idle": 1,
        "initializing": 0,
        "ready": 1,
        "running": 0,
        "throttled": 0,
        "unhealthy": 0,
    }
    harness.queue.take(worker.id, 1)
    assert harness.fleet.health()["running"] == 1
    assert harness.fleet.health()["ready"] == 0
    harness.queue.finish(worker.id, job.id, "done")
    assert harness.fleet.health()["idle"] == 1


def test_an_idle_worker_is_stopped_and_removed_when_its_process_exits() -> None:
    harness = FleetHarness(idleTimeout=5)
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    harness.fleet.tick()
    harness.queue.finish(worker.id, job.id, "done")
    harness.fleet.tick()
    harness.advance(4.9)
    assert not harness.processes[0].terminated
    harness.advance(0.1)
    assert harness.processes[0].terminated
    assert harness.stopping == [worker.id]
    assert worker.state not in TAKING_STATES
    assert not harness.fleet.is_empty
    harness.processes[0].listener.on_exit(0)
    assert harness.fleet.is_empty
    assert harness.fleet.workers() == []
    assert [exited.id for exited in harness.fleet.exited_workers()] == [worker.id]


def test_a_worker_that_ignores_sigterm_is_killed_after_its_grace_period() -> None:
    harness = FleetHarness(idleTimeout=5, grace=30)
    worker = harness.ready_worker()
    harness.fleet.stop(worker.id, "test")
    harness.advance(29.9)
    assert not harness.processes[0].killed
    harness.advance(0.1)
    assert harness.processes[0].killed
    harness.advance(0.1)
    assert sum("killed" in event for event in harness.events) == 1


def test_a_stopping_worker_can_still_finish_its_job() -> None:
    harness = FleetHarness()
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    harness.fleet.stop(worker.id, "test")
    harness.fleet.tick()
    harness.queue.finish(worker.id, job.id, "done")
    assert job.status is JobStatus.COMPLETED


def test_a_crashed_workers_job_is_requeued_and_a_new_worker_starts_after_a_backoff() -> None:
    harness = FleetHarness()
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    harness.processes[0].listener.on_exit(-9)
    assert job.status is JobStatus.IN_QUEUE
    assert harness.fleet.health()["unhealthy"] == 1
    harness.fleet.tick()
    assert len(harness.processes) == 1
    harness.advance(1.0)
    assert len(harness.processes) == 2
    assert harness.fleet.health()["unhealthy"] == 0


def test_the_backoff_grows_with_failed_starts_and_resets_when_a_worker_is_ready() -> None:
    harness = FleetHarness(workersMax=1, workersMin=1)
    backoffs_s = []
    harness.fleet.tick()
    for _ in range(8):
        harness.processes[-1].listener.on_exit(1)
        exited_at = harness.clock.now
        count = len(harness.processes)
        while len(harness.processes) == count:
            harness.advance(0.5)
        backoffs_s.append(harness.clock.now - exited_at)
    assert backoffs_s == [1, 2, 4, 8, 16, 32, 60, 60]
    harness.fleet.on_poll(harness.fleet.workers()[-1].id)
    harness.processes[-1].listener.on_exit(1)
    harness.advance(1.0)
    assert len(harness.processes) == 10


def test_a_worker_that_exits_with_0_is_replaced_at_once() -> None:
    harness = FleetHarness()
    harness.ready_worker()
    harness.processes[0].listener.on_exit(0)
    harness.fleet.tick()
    assert len(harness.processes) == 2
    assert harness.fleet.health()["unhealthy"] == 0


def test_a_worker_that_is_not_ready_in_time_is_unhealthy_and_killed() -> None:
    harness = FleetHarness(initTimeout=420)
    submit(harness.queue)
    harness.fleet.tick()
    harness.advance(420)
    assert harness.processes[0].killed
    (worker,) = harness.fleet.workers()
    assert (worker.state.value, worker.reason) == ("unhealthy", "not ready after 420 s")


def test_a_silent_worker_is_unhealthy_and_loses_its_jobs() -> None:
    harness = FleetHarness(lostAfter=40)
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    harness.advance(39.9)
    assert worker.state.value == "running"
    harness.advance(0.1)
    assert worker.state.value == "unhealthy"
    assert harness.processes[0].killed
    assert job.status is JobStatus.IN_QUEUE


def test_a_worker_that_sends_requests_is_not_silent() -> None:
    harness = FleetHarness(lostAfter=40)
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    for _ in range(5):
        harness.advance(30)
        harness.fleet.touch(worker.id)
        harness.queue.ping(worker.id, [job.id])
    assert worker.state.value == "running"


def test_a_worker_that_reports_itself_unhealthy_is_killed() -> None:
    harness = FleetHarness()
    worker = harness.ready_worker()
    harness.fleet.on_unhealthy(worker.id, "gpu_check: no GPU")
    assert harness.processes[0].killed
    assert harness.fleet.health()["unhealthy"] == 1


def test_a_worker_that_ignores_a_stop_signal_is_stopped() -> None:
    harness = FleetHarness(grace=30, idleTimeout=1000)
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    harness.queue.cancel(job.id)
    harness.clock.now += 31
    harness.fleet.touch(worker.id)
    harness.queue.ping(worker.id, [job.id])
    harness.fleet.tick()
    assert harness.processes[0].terminated


def test_throttled_workers_have_no_process_until_the_fault_is_removed() -> None:
    harness = FleetHarness()
    harness.faults.set(FaultSettings(throttled_workers=1))
    submit(harness.queue)
    submit(harness.queue)
    harness.fleet.tick()
    assert len(harness.processes) == 1
    assert harness.fleet.health()["throttled"] == 1
    harness.faults.set(FaultSettings())
    harness.fleet.tick()
    harness.fleet.tick()
    assert len(harness.processes) == 2
    assert harness.fleet.health()["throttled"] == 0


def test_an_external_worker_is_registered_and_removed_when_it_is_silent() -> None:
    harness = FleetHarness(lostAfter=40)
    worker = harness.fleet.on_poll("external")
    submit(harness.queue)
    (job,) = harness.queue.take("external", 1)
    assert harness.fleet.health()["running"] == 1
    assert worker.state in TAKING_STATES
    with pytest.raises(NotFoundError):
        harness.fleet.kill("external")
    harness.advance(40)
    assert job.status is JobStatus.IN_QUEUE
    assert "external" not in {worker.id for worker in harness.fleet.workers()}


def test_secrets_are_redacted_in_log_lines() -> None:
    harness = FleetHarness()
    worker = harness.ready_worker()
    harness.processes[0].listener.on_log_line("token is hf_very_secret, done")
    assert list(worker.log) == ["token is ***, done"]
    assert harness.log_lines == [(worker.id, "token is ***, done")]


def test_a_long_line_is_cut_after_its_secrets_are_redacted() -> None:
    harness = FleetHarness()
    worker = harness.ready_worker()
    harness.processes[0].listener.on_log_line("x" * 3995 + "hf_very_secret")
    assert list(worker.log) == ["x" * 3995 + "***"]
    harness.processes[0].listener.on_log_line("x" * 5000)
    assert worker.log[-1] == "x" * 4000


def test_a_worker_with_an_invalid_environment_is_unhealthy() -> None:
    harness = FleetHarness()

    def start(*_: object) -> FakeProcess:
        raise ValueError("illegal environment variable name")

    harness.fleet._start = start
    submit(harness.queue)
    harness.fleet.tick()
    (worker,) = harness.fleet.workers()
    assert (worker.state.value, list(worker.log)) == (
        "unhealthy",
        ["worker cannot be started: illegal environment variable name"],
    )


def test_a_closed_fleet_stops_all_workers_and_starts_none() -> None:
    harness = FleetHarness(workersMin=2)
    harness.fleet.tick()
    harness.fleet.close()
    harness.fleet.tick()
    assert [process.terminated for process in harness.processes] == [True, True]
    for process in harness.processes:
        process.listener.on_exit(0)
    harness.advance(100)
    assert harness.fleet.is_empty
    assert len(harness.processes) == 2


def test_workers_scale_from_zero_to_two_to_zero() -> None:
    harness = FleetHarness(scalerType="QUEUE_DELAY", scalerValue=4, idleTimeout=5, workersMax=2)
    for number in range(8):
        submit(harness.queue, number)
    counts = [0]
    for _ in range(400):
        harness.advance(0.1)
        harness.run_workers(2.0)
        if counts[-1] != len(harness.fleet.workers()):
            counts.append(len(harness.fleet.workers()))
    assert counts[:3] == [0, 1, 2]
    assert counts[-1] == 0
    assert max(counts) == 2
    assert harness.queue.health()["completed"] == 8


def release(harness: FleetHarness, version: int = 2, **settings: Any) -> None:
    """Update the fleet's settings, as a release of this version does."""
    harness.settings = EndpointSettings.model_validate({**harness.settings.model_dump(), **settings})
    harness.fleet.update(harness.settings, Redaction({}, ()), version)


def test_an_idle_stale_worker_is_replaced_at_once() -> None:
    harness = FleetHarness(scalerType="QUEUE_DELAY", workersMin=1, workersMax=1)
    harness.fleet.tick()
    (worker,) = harness.fleet.workers()
    harness.fleet.on_poll(worker.id)
    release(harness, env={"A": "2"})
    assert not worker.takes_jobs
    harness.fleet.tick()
    assert harness.processes[0].terminated
    assert worker.reason == "replaced by version 2"
    assert len(harness.processes) == 1  # workersMax
    harness.processes[0].listener.on_exit(0)
    harness.fleet.tick()
    assert harness.processes[1].env["A"] == "2"
    (other,) = harness.fleet.workers()
    assert (other.version, other.is_stale) == (2, False)


def test_an_idle_worker_that_no_job_needs_is_replaced_too_and_only_once() -> None:
    harness = FleetHarness(scalerType="QUEUE_DELAY", idleTimeout=5, workersMax=3)
    submit(harness.queue)
    harness.advance(60)
    (worker,) = harness.fleet.workers()
    harness.fleet.on_poll(worker.id)
    (job,) = harness.queue.take(worker.id, 1)
    harness.queue.finish(worker.id, job.id, "done")
    release(harness)
    for _ in range(3):
        harness.fleet.tick()
    assert [process.terminated for process in harness.processes] == [True, False]
    harness.processes[0].listener.on_exit(0)
    harness.fleet.on_poll(harness.fleet.workers()[-1].id)
    harness.advance(5)
    assert harness.processes[1].terminated
    harness.processes[1].listener.on_exit(0)
    harness.advance(60)
    assert len(harness.processes) == 2


def test_a_busy_stale_worker_finishes_its_job_and_is_given_no_other() -> None:
    harness = FleetHarness(workersMax=1)
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    release(harness)
    harness.advance(30)
    assert not harness.processes[0].terminated
    assert worker.state in TAKING_STATES
    assert not worker.takes_jobs
    harness.queue.finish(worker.id, job.id, "done")
    harness.fleet.tick()
    assert harness.processes[0].terminated
    assert job.status is JobStatus.COMPLETED


def test_workers_that_start_fail_or_are_throttled_are_replaced_without_a_backoff() -> None:
    harness = FleetHarness(workersMin=2, workersMax=2)
    harness.faults.set(FaultSettings(throttled_workers=1))
    harness.fleet.tick()
    harness.processes[0].listener.on_exit(1)
    assert harness.fleet.health()["unhealthy"] == harness.fleet.health()["throttled"] == 1
    harness.faults.set(FaultSettings())
    release(harness)
    harness.fleet.tick()
    assert [worker.version for worker in harness.fleet.workers()] == [2, 2]
    assert len(harness.processes) == 3
    release(harness, version=3)
    harness.fleet.tick()
    assert [process.terminated for process in harness.processes] == [False, True, True]


def test_other_settings_of_the_same_version_replace_no_worker() -> None:
    harness = FleetHarness(scalerType="QUEUE_DELAY", workersMin=1, workersMax=2)
    harness.fleet.tick()
    harness.fleet.on_poll(harness.fleet.workers()[0].id)
    release(harness, version=1, workers_min=2)
    harness.fleet.tick()
    assert [process.terminated for process in harness.processes] == [False, False]


def test_an_external_worker_is_never_stale() -> None:
    harness = FleetHarness()
    worker = harness.fleet.on_poll("external")
    release(harness)
    assert worker.takes_jobs


def test_a_frozen_stale_worker_is_ended_and_not_replaced() -> None:
    harness = FleetHarness(scalerType="QUEUE_DELAY", idleTimeout=5, flashboot=True)
    submit(harness.queue)
    harness.advance(60)
    worker = harness.fleet.on_poll(harness.fleet.workers()[0].id)
    (job,) = harness.queue.take(worker.id, 1)
    harness.fleet.tick()
    harness.queue.finish(worker.id, job.id, "done")
    harness.fleet.tick()
    harness.advance(5)
    assert worker.state is WorkerState.FROZEN
    release(harness)
    harness.fleet.tick()
    assert harness.processes[0].killed
    harness.processes[0].listener.on_exit(-9)
    submit(harness.queue)
    harness.advance(60)
    assert [one.version for one in harness.fleet.workers()] == [2]
