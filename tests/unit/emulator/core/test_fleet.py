"""The workers of an endpoint, with processes that end when they are told to and time that is set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from emulator.core.faults import Faults, FaultSettings
from emulator.core.fleet import Fleet, Worker
from emulator.core.job import JobStatus
from emulator.core.process import ProcessListener
from emulator.errors import NotFoundError
from emulator.redaction import Redaction
from emulator.settings import EndpointSettings
from tests.unit.emulator.fakes import Clock, FakeProcess, queue, submit


class Stage:
    """A fleet with everything around it in the test's hands."""

    def __init__(self, ca_environment: dict[str, str] | None = None, **settings: Any) -> None:
        self.clock = Clock()
        self.settings = EndpointSettings.model_validate(
            {"command": "worker --fast", "workersMax": 2, "scalerType": "REQUEST_COUNT", "scalerValue": 1, **settings}
        )
        rules = self.settings.rules()
        self.queue = queue(self.clock, **{name: getattr(rules, name) for name in rules.__dataclass_fields__})
        self.processes: list[FakeProcess] = []
        self.faults = Faults()
        self.events: list[str] = []
        self.log_lines: list[tuple[str, str]] = []
        self.stopping: list[str] = []
        self.fleet = Fleet(
            self.settings,
            self.queue,
            self,
            base_url="http://127.0.0.1:1",
            worker_key="worker-key",
            ca_environment=ca_environment or {},
            clock=self.clock,
            start=self.start,
            faults=self.faults,
            redaction=Redaction({"HF_TOKEN": "hf_very_secret"}, ()),
        )

    def event(self, line: str) -> None:
        self.events.append(line)

    def worker_logged(self, worker: str, line: str) -> None:
        self.log_lines.append((worker, line))

    def worker_stopping(self, worker: str) -> None:
        self.stopping.append(worker)

    def start(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str | None, listener: ProcessListener
    ) -> FakeProcess:
        process = FakeProcess(command, env, cwd, listener)
        self.processes.append(process)
        return process

    def ready_worker(self) -> Worker:
        """A worker that was started for a job and has come up."""
        submit(self.queue)
        self.fleet.tick()
        return self.fleet.polled(self.fleet.workers()[-1].id)

    def play_workers(self, job_s: float) -> None:
        """Let every worker come up, do one job after the other, and end when it is told to."""
        for worker in self.fleet.workers():
            if isinstance(worker.process, FakeProcess) and worker.process.terminated:
                worker.process.listener.exited(0)
                continue
            self.fleet.polled(worker.id)
            for job in self.queue.held(worker.id):
                if self.clock.now - (job.taken_at or 0) >= job_s:
                    self.queue.finish(worker.id, job.id, "done")
            if not self.queue.held(worker.id):
                self.queue.take(worker.id, 1)

    def after(self, seconds: float) -> None:
        self.clock.now += seconds
        self.fleet.tick()


def test_a_worker_is_started_with_all_that_the_sdk_needs() -> None:
    stage = Stage(id="ep", env={"MODEL_NAME": "tiny"}, cwd="/srv")
    stage.ready_worker()
    (process,) = stage.processes
    worker = stage.fleet.workers()[0].id
    root = "http://127.0.0.1:1/v2/ep"
    expected = {
        "RUNPOD_WEBHOOK_GET_JOB": f"{root}/job-take/$ID?gpu=EMULATED",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{root}/job-done/$RUNPOD_POD_ID/$ID?gpu=EMULATED",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{root}/job-stream/$RUNPOD_POD_ID/$ID?gpu=EMULATED",
        "RUNPOD_WEBHOOK_PING": f"{root}/ping/$RUNPOD_POD_ID",
        "RUNPOD_PING_INTERVAL": "10000",
        "RUNPOD_AI_API_KEY": "worker-key",
        "RUNPOD_ENDPOINT_ID": "ep",
        "RUNPOD_POD_ID": worker,
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
        "MODEL_NAME": "tiny",
    }
    assert {name: process.env[name] for name in expected} == expected
    assert (process.command, process.cwd) == (("worker", "--fast"), "/srv")


def test_a_worker_trusts_the_emulators_ca_unless_its_endpoint_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/the/machines")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/the/machines")
    ca_environment = {"SSL_CERT_FILE": "/the/emulators", "REQUESTS_CA_BUNDLE": "/the/emulators"}
    stage = Stage(ca_environment, env={"REQUESTS_CA_BUNDLE": "/the/endpoints"})
    stage.ready_worker()
    env = stage.processes[0].env
    assert (env["SSL_CERT_FILE"], env["REQUESTS_CA_BUNDLE"]) == ("/the/emulators", "/the/endpoints")


def test_a_worker_is_initializing_then_idle_then_running_then_idle() -> None:
    stage = Stage()
    job = submit(stage.queue)
    stage.fleet.tick()
    assert stage.fleet.health()["initializing"] == 1
    (worker,) = stage.fleet.workers()
    stage.fleet.polled(worker.id)
    assert stage.fleet.health() == {
        "idle": 1,
        "initializing": 0,
        "ready": 1,
        "running": 0,
        "throttled": 0,
        "unhealthy": 0,
    }
    stage.queue.take(worker.id, 1)
    assert stage.fleet.health()["running"] == 1
    assert stage.fleet.health()["ready"] == 0
    stage.queue.finish(worker.id, job.id, "done")
    assert stage.fleet.health()["idle"] == 1


def test_an_idle_worker_is_stopped_and_gone_when_its_process_is() -> None:
    stage = Stage(idleTimeout=5)
    worker = stage.ready_worker()
    (job,) = stage.queue.take(worker.id, 1)
    stage.fleet.tick()
    stage.queue.finish(worker.id, job.id, "done")
    stage.fleet.tick()
    stage.after(4.9)
    assert not stage.processes[0].terminated
    stage.after(0.1)
    assert stage.processes[0].terminated
    assert stage.stopping == [worker.id]
    assert not stage.fleet.may_take(worker)
    assert not stage.fleet.empty
    stage.processes[0].listener.exited(0)
    assert stage.fleet.empty
    assert stage.fleet.workers() == []
    assert [gone.id for gone in stage.fleet.gone()] == [worker.id]


def test_a_worker_that_ignores_sigterm_is_killed_when_its_grace_is_over() -> None:
    stage = Stage(idleTimeout=5, grace=30)
    worker = stage.ready_worker()
    stage.fleet.stop(worker.id, "test")
    stage.after(29.9)
    assert not stage.processes[0].killed
    stage.after(0.1)
    assert stage.processes[0].killed


def test_a_stopping_worker_may_still_deliver_what_it_has() -> None:
    stage = Stage()
    worker = stage.ready_worker()
    (job,) = stage.queue.take(worker.id, 1)
    stage.fleet.stop(worker.id, "test")
    stage.fleet.tick()
    stage.queue.finish(worker.id, job.id, "done")
    assert job.status is JobStatus.COMPLETED


def test_a_crashed_workers_job_goes_back_and_another_worker_is_started_after_a_pause() -> None:
    stage = Stage()
    worker = stage.ready_worker()
    (job,) = stage.queue.take(worker.id, 1)
    stage.processes[0].listener.exited(-9)
    assert job.status is JobStatus.IN_QUEUE
    assert stage.fleet.health()["unhealthy"] == 1
    stage.fleet.tick()
    assert len(stage.processes) == 1
    stage.after(1.0)
    assert len(stage.processes) == 2
    assert stage.fleet.health()["unhealthy"] == 0


def test_pauses_grow_while_workers_do_not_come_up_and_end_when_one_does() -> None:
    stage = Stage(workersMax=1, workersMin=1)
    pauses = []
    stage.fleet.tick()
    for _ in range(8):
        stage.processes[-1].listener.exited(1)
        died = stage.clock.now
        count = len(stage.processes)
        while len(stage.processes) == count:
            stage.after(0.5)
        pauses.append(stage.clock.now - died)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    stage.fleet.polled(stage.fleet.workers()[-1].id)
    stage.processes[-1].listener.exited(1)
    stage.after(1.0)
    assert len(stage.processes) == 10


def test_a_worker_that_ends_by_itself_without_an_error_is_replaced_at_once() -> None:
    stage = Stage()
    stage.ready_worker()
    stage.processes[0].listener.exited(0)
    stage.fleet.tick()
    assert len(stage.processes) == 2
    assert stage.fleet.health()["unhealthy"] == 0


def test_a_start_above_the_limit_is_unhealthy_and_killed() -> None:
    stage = Stage(initTimeout=420)
    submit(stage.queue)
    stage.fleet.tick()
    stage.after(420)
    assert stage.processes[0].killed
    (worker,) = stage.fleet.workers()
    assert (worker.state.value, worker.reason) == ("unhealthy", "not ready after 420 s")


def test_a_silent_worker_is_unhealthy_and_loses_its_jobs() -> None:
    stage = Stage(lostAfter=40)
    worker = stage.ready_worker()
    (job,) = stage.queue.take(worker.id, 1)
    stage.after(39.9)
    assert worker.state.value == "running"
    stage.after(0.1)
    assert worker.state.value == "unhealthy"
    assert stage.processes[0].killed
    assert job.status is JobStatus.IN_QUEUE


def test_a_worker_that_calls_is_not_silent() -> None:
    stage = Stage(lostAfter=40)
    worker = stage.ready_worker()
    (job,) = stage.queue.take(worker.id, 1)
    for _ in range(5):
        stage.after(30)
        stage.fleet.called(worker.id)
        stage.queue.ping(worker.id, [job.id])
    assert worker.state.value == "running"


def test_a_worker_that_reports_itself_unhealthy_is_killed() -> None:
    stage = Stage()
    worker = stage.ready_worker()
    stage.fleet.unhealthy(worker.id, "gpu_check: no GPU")
    assert stage.processes[0].killed
    assert stage.fleet.health()["unhealthy"] == 1


def test_a_worker_that_does_not_stop_a_job_is_stopped_itself() -> None:
    stage = Stage(grace=30, idleTimeout=1000)
    worker = stage.ready_worker()
    (job,) = stage.queue.take(worker.id, 1)
    stage.queue.cancel(job.id)
    stage.clock.now += 31
    stage.fleet.called(worker.id)
    stage.queue.ping(worker.id, [job.id])
    stage.fleet.tick()
    assert stage.processes[0].terminated


def test_throttled_workers_have_no_process_until_the_fault_ends() -> None:
    stage = Stage()
    stage.faults.set(FaultSettings(throttled_workers=1))
    submit(stage.queue)
    submit(stage.queue)
    stage.fleet.tick()
    assert len(stage.processes) == 1
    assert stage.fleet.health()["throttled"] == 1
    stage.faults.set(FaultSettings())
    stage.fleet.tick()
    stage.fleet.tick()
    assert len(stage.processes) == 2
    assert stage.fleet.health()["throttled"] == 0


def test_a_worker_started_by_hand_is_taken_in_and_forgotten_when_it_is_silent() -> None:
    stage = Stage(lostAfter=40)
    worker = stage.fleet.polled("by-hand")
    submit(stage.queue)
    (job,) = stage.queue.take("by-hand", 1)
    assert stage.fleet.health()["running"] == 1
    assert stage.fleet.may_take(worker)
    with pytest.raises(NotFoundError):
        stage.fleet.kill("by-hand")
    stage.after(40)
    assert job.status is JobStatus.IN_QUEUE
    assert "by-hand" not in {worker.id for worker in stage.fleet.workers()}


def test_secrets_are_taken_out_of_log_lines() -> None:
    stage = Stage()
    worker = stage.ready_worker()
    stage.processes[0].listener.logged("token is hf_very_secret, done")
    assert list(worker.log) == ["token is ***, done"]
    assert stage.log_lines == [(worker.id, "token is ***, done")]


def test_a_closed_fleet_stops_all_and_starts_none() -> None:
    stage = Stage(workersMin=2)
    stage.fleet.tick()
    stage.fleet.close()
    stage.fleet.tick()
    assert [process.terminated for process in stage.processes] == [True, True]
    for process in stage.processes:
        process.listener.exited(0)
    stage.after(100)
    assert stage.fleet.empty
    assert len(stage.processes) == 2


def test_the_workers_go_from_none_to_two_to_none() -> None:
    stage = Stage(scalerType="QUEUE_DELAY", scalerValue=4, idleTimeout=5, workersMax=2)
    for number in range(8):
        submit(stage.queue, number)
    counts = [0]
    for _ in range(400):
        stage.after(0.1)
        stage.play_workers(2.0)
        if counts[-1] != len(stage.fleet.workers()):
            counts.append(len(stage.fleet.workers()))
    assert counts[:3] == [0, 1, 2]
    assert counts[-1] == 0
    assert max(counts) == 2
    assert stage.queue.health()["completed"] == 8
