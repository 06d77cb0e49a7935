"""The workers of an endpoint, with processes that end when they are told to and time that is set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from emulator.core.faults import Faults, FaultSettings
from emulator.core.fleet import Fleet
from emulator.core.job import JobStatus
from emulator.core.process import ProcessListener
from emulator.core.worker import TAKING_STATES, FleetWorker
from emulator.errors import NotFoundError
from emulator.redaction import Redaction
from emulator.settings import EndpointSettings
from tests.unit.emulator.fakes import Clock, FakeProcess, queue, submit


class FleetHarness:
    """A fleet with everything around it in the test's hands."""

    def __init__(self, ca_environment: dict[str, str] | None = None, **settings: Any) -> None:
        self.clock = Clock()
        self.settings = EndpointSettings.model_validate(
            {"command": "worker --fast", "workersMax": 2, "scalerType": "REQUEST_COUNT", "scalerValue": 1, **settings}
        )
        rules = self.settings.queue_settings()
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

    def on_event(self, line: str) -> None:
        self.events.append(line)

    def on_worker_log(self, worker: str, line: str) -> None:
        self.log_lines.append((worker, line))

    def on_worker_stopping(self, worker: str) -> None:
        self.stopping.append(worker)

    def start(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str | None, listener: ProcessListener
    ) -> FakeProcess:
        process = FakeProcess(command, env, cwd, listener)
        self.processes.append(process)
        return process

    def ready_worker(self) -> FleetWorker:
        """A worker that was started for a job and has come up."""
        submit(self.queue)
        self.fleet.tick()
        return self.fleet.on_poll(self.fleet.workers()[-1].id)

    def play_workers(self, job_s: float) -> None:
        """Let every worker come up, do one job after the other, and end when it is told to."""
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

    def after(self, seconds: float) -> None:
        self.clock.now += seconds
        self.fleet.tick()


def test_a_worker_is_started_with_all_that_the_sdk_needs() -> None:
    harness = FleetHarness(id="ep", env={"MODEL_NAME": "tiny"}, cwd="/srv")
    harness.ready_worker()
    (process,) = harness.processes
    worker = harness.fleet.workers()[0].id
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
    harness = FleetHarness(ca_environment, env={"REQUESTS_CA_BUNDLE": "/the/endpoints"})
    harness.ready_worker()
    env = harness.processes[0].env
    assert (env["SSL_CERT_FILE"], env["REQUESTS_CA_BUNDLE"]) == ("/the/emulators", "/the/endpoints")


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


def test_an_idle_worker_is_stopped_and_gone_when_its_process_is() -> None:
    harness = FleetHarness(idleTimeout=5)
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    harness.fleet.tick()
    harness.queue.finish(worker.id, job.id, "done")
    harness.fleet.tick()
    harness.after(4.9)
    assert not harness.processes[0].terminated
    harness.after(0.1)
    assert harness.processes[0].terminated
    assert harness.stopping == [worker.id]
    assert worker.state not in TAKING_STATES
    assert not harness.fleet.is_empty
    harness.processes[0].listener.on_exit(0)
    assert harness.fleet.is_empty
    assert harness.fleet.workers() == []
    assert [gone.id for gone in harness.fleet.exited_workers()] == [worker.id]


def test_a_worker_that_ignores_sigterm_is_killed_when_its_grace_is_over() -> None:
    harness = FleetHarness(idleTimeout=5, grace=30)
    worker = harness.ready_worker()
    harness.fleet.stop(worker.id, "test")
    harness.after(29.9)
    assert not harness.processes[0].killed
    harness.after(0.1)
    assert harness.processes[0].killed


def test_a_stopping_worker_may_still_deliver_what_it_has() -> None:
    harness = FleetHarness()
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    harness.fleet.stop(worker.id, "test")
    harness.fleet.tick()
    harness.queue.finish(worker.id, job.id, "done")
    assert job.status is JobStatus.COMPLETED


def test_a_crashed_workers_job_goes_back_and_another_worker_is_started_after_a_pause() -> None:
    harness = FleetHarness()
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    harness.processes[0].listener.on_exit(-9)
    assert job.status is JobStatus.IN_QUEUE
    assert harness.fleet.health()["unhealthy"] == 1
    harness.fleet.tick()
    assert len(harness.processes) == 1
    harness.after(1.0)
    assert len(harness.processes) == 2
    assert harness.fleet.health()["unhealthy"] == 0


def test_pauses_grow_while_workers_do_not_come_up_and_end_when_one_does() -> None:
    harness = FleetHarness(workersMax=1, workersMin=1)
    pauses = []
    harness.fleet.tick()
    for _ in range(8):
        harness.processes[-1].listener.on_exit(1)
        died = harness.clock.now
        count = len(harness.processes)
        while len(harness.processes) == count:
            harness.after(0.5)
        pauses.append(harness.clock.now - died)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    harness.fleet.on_poll(harness.fleet.workers()[-1].id)
    harness.processes[-1].listener.on_exit(1)
    harness.after(1.0)
    assert len(harness.processes) == 10


def test_a_worker_that_ends_by_itself_without_an_error_is_replaced_at_once() -> None:
    harness = FleetHarness()
    harness.ready_worker()
    harness.processes[0].listener.on_exit(0)
    harness.fleet.tick()
    assert len(harness.processes) == 2
    assert harness.fleet.health()["unhealthy"] == 0


def test_a_start_above_the_limit_is_unhealthy_and_killed() -> None:
    harness = FleetHarness(initTimeout=420)
    submit(harness.queue)
    harness.fleet.tick()
    harness.after(420)
    assert harness.processes[0].killed
    (worker,) = harness.fleet.workers()
    assert (worker.state.value, worker.reason) == ("unhealthy", "not ready after 420 s")


def test_a_silent_worker_is_unhealthy_and_loses_its_jobs() -> None:
    harness = FleetHarness(lostAfter=40)
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    harness.after(39.9)
    assert worker.state.value == "running"
    harness.after(0.1)
    assert worker.state.value == "unhealthy"
    assert harness.processes[0].killed
    assert job.status is JobStatus.IN_QUEUE


def test_a_worker_that_calls_is_not_silent() -> None:
    harness = FleetHarness(lostAfter=40)
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    for _ in range(5):
        harness.after(30)
        harness.fleet.touch(worker.id)
        harness.queue.ping(worker.id, [job.id])
    assert worker.state.value == "running"


def test_a_worker_that_reports_itself_unhealthy_is_killed() -> None:
    harness = FleetHarness()
    worker = harness.ready_worker()
    harness.fleet.on_unhealthy(worker.id, "gpu_check: no GPU")
    assert harness.processes[0].killed
    assert harness.fleet.health()["unhealthy"] == 1


def test_a_worker_that_does_not_stop_a_job_is_stopped_itself() -> None:
    harness = FleetHarness(grace=30, idleTimeout=1000)
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    harness.queue.cancel(job.id)
    harness.clock.now += 31
    harness.fleet.touch(worker.id)
    harness.queue.ping(worker.id, [job.id])
    harness.fleet.tick()
    assert harness.processes[0].terminated


def test_throttled_workers_have_no_process_until_the_fault_ends() -> None:
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


def test_a_worker_started_by_hand_is_taken_in_and_forgotten_when_it_is_silent() -> None:
    harness = FleetHarness(lostAfter=40)
    worker = harness.fleet.on_poll("by-hand")
    submit(harness.queue)
    (job,) = harness.queue.take("by-hand", 1)
    assert harness.fleet.health()["running"] == 1
    assert worker.state in TAKING_STATES
    with pytest.raises(NotFoundError):
        harness.fleet.kill("by-hand")
    harness.after(40)
    assert job.status is JobStatus.IN_QUEUE
    assert "by-hand" not in {worker.id for worker in harness.fleet.workers()}


def test_secrets_are_taken_out_of_log_lines() -> None:
    harness = FleetHarness()
    worker = harness.ready_worker()
    harness.processes[0].listener.on_log_line("token is hf_very_secret, done")
    assert list(worker.log) == ["token is ***, done"]
    assert harness.log_lines == [(worker.id, "token is ***, done")]


def test_a_closed_fleet_stops_all_and_starts_none() -> None:
    harness = FleetHarness(workersMin=2)
    harness.fleet.tick()
    harness.fleet.close()
    harness.fleet.tick()
    assert [process.terminated for process in harness.processes] == [True, True]
    for process in harness.processes:
        process.listener.on_exit(0)
    harness.after(100)
    assert harness.fleet.is_empty
    assert len(harness.processes) == 2


def test_the_workers_go_from_none_to_two_to_none() -> None:
    harness = FleetHarness(scalerType="QUEUE_DELAY", scalerValue=4, idleTimeout=5, workersMax=2)
    for number in range(8):
        submit(harness.queue, number)
    counts = [0]
    for _ in range(400):
        harness.after(0.1)
        harness.play_workers(2.0)
        if counts[-1] != len(harness.fleet.workers()):
            counts.append(len(harness.fleet.workers()))
    assert counts[:3] == [0, 1, 2]
    assert counts[-1] == 0
    assert max(counts) == 2
    assert harness.queue.health()["completed"] == 8
