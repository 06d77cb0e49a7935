"""FlashBoot in the fleet: idle workers are frozen instead of stopped, and thawed when they are needed."""

from __future__ import annotations

import pytest

from emulator.core.job import JobStatus
from emulator.core.worker import FleetWorker, WorkerState
from emulator.errors import NotFoundError
from tests.unit.emulator.core.test_fleet import FleetHarness
from tests.unit.emulator.fakes import submit


def idle_worker(harness: FleetHarness) -> FleetWorker:
    """Return a worker that has run a job and is idle."""
    worker = harness.ready_worker()
    for job in harness.queue.take(worker.id, 1):
        harness.fleet.tick()
        harness.queue.finish(worker.id, job.id, "done")
    harness.fleet.tick()
    return worker


def frozen_worker(**settings: object) -> tuple[FleetHarness, FleetWorker]:
    """Return a fleet whose one worker FlashBoot has frozen."""
    harness = FleetHarness(flashboot=True, idleTimeout=5, **settings)
    worker = idle_worker(harness)
    harness.advance(5)
    assert worker.state is WorkerState.FROZEN
    return harness, worker


def test_an_idle_worker_is_frozen_and_its_connections_are_dropped() -> None:
    harness, worker = frozen_worker()

    assert harness.processes[0].frozen
    assert not harness.processes[0].terminated
    assert harness.frozen == [(worker.id, True)]
    assert harness.fleet.health()["idle"] == 0


def test_a_frozen_worker_is_thawed_for_the_next_job_and_no_other_is_started() -> None:
    harness, worker = frozen_worker()
    harness.advance(100)
    job = submit(harness.queue)
    harness.fleet.tick()

    assert not harness.processes[0].frozen
    assert len(harness.processes) == 1
    assert worker.state is WorkerState.IDLE
    assert harness.thawed == [worker.id]
    harness.queue.take(worker.id, 1)
    harness.clock.now += 0.25
    harness.queue.finish(worker.id, job.id, "done")
    harness.fleet.on_answer(worker.id)
    harness.fleet.on_answer(worker.id)
    assert harness.events[-2:] == [
        f"worker {worker.id} restored after 100.0 s",
        f"worker {worker.id} answered 0.250 s after it was restored",
    ]


def test_a_frozen_worker_is_not_lost_and_a_long_freeze_ends_it() -> None:
    harness, worker = frozen_worker(lostAfter=40, frozenTimeout=600)
    harness.advance(599)
    assert not harness.processes[0].killed
    harness.advance(1)
    assert harness.processes[0].killed
    harness.processes[0].listener.on_exit(-9)
    assert [one.id for one in harness.fleet.exited_workers()] == [worker.id]
    assert not any("unhealthy" in event for event in harness.events)


def test_frozen_workers_count_towards_the_maximum() -> None:
    harness, _ = frozen_worker(workersMax=2)
    for _ in range(3):
        submit(harness.queue)
    harness.fleet.tick()

    assert len(harness.processes) == 2
    assert not harness.processes[0].frozen


def test_the_minimum_of_workers_is_never_frozen() -> None:
    harness = FleetHarness(flashboot=True, idleTimeout=5, workersMin=1)
    idle_worker(harness)
    harness.advance(60)

    assert not harness.processes[0].frozen


def test_a_frozen_worker_is_killed_at_once_when_the_fleet_closes() -> None:
    """It could not react to SIGTERM."""
    harness, _ = frozen_worker()
    harness.fleet.close()

    assert harness.processes[0].killed


def test_a_worker_that_is_frozen_on_request_stays_so_and_its_job_is_lost_after_a_while() -> None:
    harness = FleetHarness(workersMin=2, workersMax=2, lostAfter=40, frozenTimeout=60, maxRetries=1)
    worker = harness.ready_worker()
    (job,) = harness.queue.take(worker.id, 1)
    harness.fleet.freeze(worker.id, "test", drops_connections=False, is_held=True)
    harness.advance(39)
    assert job.retries == 0
    harness.advance(1)
    assert (job.retries, job.status) == (1, JobStatus.IN_QUEUE)
    harness.advance(1000)
    assert [process.frozen for process in harness.processes] == [False, True]

    harness.fleet.thaw(worker.id)
    harness.fleet.tick()
    assert worker.state is WorkerState.IDLE
    assert harness.frozen == [(worker.id, False)]


def test_a_worker_that_starts_can_be_frozen_and_goes_on_starting() -> None:
    harness = FleetHarness()
    submit(harness.queue)
    harness.fleet.tick()
    (worker,) = harness.fleet.workers()
    harness.fleet.freeze(worker.id, "test", is_held=True)
    harness.advance(10_000)
    harness.fleet.thaw(worker.id)

    assert worker.state is WorkerState.INITIALIZING
    harness.fleet.tick()
    assert worker.state is WorkerState.INITIALIZING


def test_only_a_running_worker_is_frozen_and_only_a_frozen_one_thawed() -> None:
    harness = FleetHarness()
    worker = harness.ready_worker()
    with pytest.raises(NotFoundError, match="no frozen worker"):
        harness.fleet.thaw(worker.id)
    harness.fleet.stop(worker.id, "test")
    with pytest.raises(NotFoundError, match="that runs"):
        harness.fleet.freeze(worker.id, "test")
    with pytest.raises(NotFoundError, match="that runs"):
        harness.fleet.freeze("unknown", "test")
