"""The queue, one rule at a time; `test_job_queue_machine.py` tests random sequences of operations."""

from __future__ import annotations

import re

import pytest

from emulator.core.job import JobStatus
from emulator.core.job_queue import JOBS_QUEUED_TOPIC, JobQueue, QueueSettings, job_stop_topic, job_topic
from emulator.errors import JobNotAssignedError, JobStateError, NotFoundError, TooManyRequestsError
from tests.unit.emulator.fakes import FakeClock, RecordingListener, queue, submission, submit


def test_jobs_are_taken_in_submission_order() -> None:
    jobs = queue(FakeClock())
    submitted = [submit(jobs).id for _ in range(3)]
    assert [job.id for job in jobs.take("a", 2)] == submitted[:2]
    assert [job.id for job in jobs.take("b", 2)] == submitted[2:]
    assert jobs.take("b", 2) == []


def test_a_finished_job_has_output_and_times() -> None:
    clock = FakeClock()
    jobs = queue(clock)
    job = submit(jobs)
    clock.now += 0.824
    jobs.take("a", 1)
    clock.now += 3.391
    jobs.finish("a", job.id, {"text": "hi"})
    assert job.document() == {
        "id": job.id,
        "status": "COMPLETED",
        "delayTime": 824,
        "executionTime": 3391,
        "workerId": "a",
        "output": {"text": "hi"},
    }


def test_a_waiting_job_has_only_its_status() -> None:
    jobs = queue(FakeClock())
    job = submit(jobs)
    assert job.document() == {"id": job.id, "status": "IN_QUEUE"}


def test_progress_is_the_output_while_the_job_runs() -> None:
    jobs = queue(FakeClock())
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.progress("a", job.id, "half")
    assert job.document() == {
        "id": job.id,
        "status": "IN_PROGRESS",
        "delayTime": 0,
        "workerId": "a",
        "output": "half",
    }


@pytest.mark.parametrize("deliver", ["stream", "progress", "finish"])
def test_an_update_from_a_worker_without_the_job_is_rejected(deliver: str) -> None:
    jobs = queue(FakeClock())
    job = submit(jobs)
    jobs.take("a", 1)
    with pytest.raises(JobNotAssignedError):
        getattr(jobs, deliver)("b", job.id, "output")
    assert job.status is JobStatus.IN_PROGRESS
    assert job.outputs == []


def test_a_second_result_is_rejected() -> None:
    jobs = queue(FakeClock())
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.finish("a", job.id, "first")
    with pytest.raises(JobNotAssignedError):
        jobs.finish("a", job.id, "second")
    assert job.output == "first"


def test_each_output_is_read_once() -> None:
    jobs = queue(FakeClock())
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.stream("a", job.id, 1)
    jobs.stream("a", job.id, 2)
    assert jobs.read_stream(job) == [1, 2]
    jobs.stream("a", job.id, 3)
    assert jobs.read_stream(job) == [3]
    assert jobs.read_stream(job) == []


def test_a_lost_workers_jobs_return_to_the_head_of_the_queue_in_order() -> None:
    jobs = queue(FakeClock())
    first, second, third = (submit(jobs) for _ in range(3))
    jobs.take("a", 2)
    jobs.on_worker_lost("a")
    assert [job.id for job in jobs.take("b", 3)] == [first.id, second.id, third.id]
    assert jobs.health()["retried"] == 2
    assert first.document()["retries"] == 1
    assert "retries" not in third.document()


def test_a_job_lost_after_its_last_retry_fails_with_the_platforms_message() -> None:
    jobs = queue(FakeClock(), max_retries=1)
    job = submit(jobs)
    for worker in ("a", "b"):
        jobs.take(worker, 1)
        jobs.on_worker_lost(worker)
    assert (job.status, job.error) == (JobStatus.FAILED, "job timed out after 1 retries")
    assert jobs.health() == {"completed": 0, "failed": 1, "inProgress": 0, "inQueue": 0, "retried": 1}


def test_a_lost_jobs_outputs_are_discarded() -> None:
    jobs = queue(FakeClock())
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.stream("a", job.id, "half an ans")
    jobs.on_worker_lost("a")
    jobs.take("b", 1)
    jobs.stream("b", job.id, "an answer")
    assert jobs.read_stream(job) == ["an answer"]


def test_a_job_missing_from_its_workers_pings_is_lost() -> None:
    clock = FakeClock()
    jobs = queue(clock, lost_after_s=40)
    kept, dropped = submit(jobs), submit(jobs)
    jobs.take("a", 2)
    for _ in range(4):
        clock.now += 10
        jobs.ping("a", [kept.id])
        jobs.expire()
    assert kept.status is JobStatus.IN_PROGRESS
    assert dropped.status is JobStatus.IN_QUEUE


def test_outputs_count_as_reports_of_the_job() -> None:
    clock = FakeClock()
    jobs = queue(clock, lost_after_s=40)
    job = submit(jobs)
    jobs.take("a", 1)
    for _ in range(3):
        clock.now += 30
        jobs.stream("a", job.id, "more")
        jobs.expire()
    assert job.status is JobStatus.IN_PROGRESS


def test_cancelling_a_running_job_sends_its_worker_one_stop_signal() -> None:
    jobs = queue(FakeClock())
    job = submit(jobs)
    jobs.take("a", 1)
    assert jobs.cancel(job.id).status is JobStatus.CANCELLED
    assert jobs.pop_stop_signals("a") == [job.id]
    assert jobs.pop_stop_signals("a") == []
    with pytest.raises(JobNotAssignedError):
        jobs.finish("a", job.id, "too late")


def test_cancelling_a_waiting_job_sends_no_stop_signal() -> None:
    jobs = queue(FakeClock())
    job = submit(jobs)
    jobs.cancel(job.id)
    assert job.status is JobStatus.CANCELLED
    assert jobs.take("a", 1) == []
    assert jobs.pop_stop_signals("a") == []


def test_cancelling_a_job_that_has_ended_changes_nothing() -> None:
    jobs = queue(FakeClock())
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.finish("a", job.id, "done")
    assert jobs.cancel(job.id).status is JobStatus.COMPLETED
    assert job.output == "done"


def test_a_worker_that_reports_a_stopped_job_after_the_grace_period_is_unresponsive() -> None:
    clock = FakeClock()
    jobs = queue(clock, stop_grace_s=30)
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.cancel(job.id)
    clock.now += 30
    jobs.ping("a", [job.id])
    assert jobs.unresponsive_workers() == set()
    clock.now += 1
    jobs.ping("a", [job.id])
    assert jobs.unresponsive_workers() == {"a"}


def test_a_worker_that_no_longer_reports_a_stopped_job_is_responsive() -> None:
    clock = FakeClock()
    jobs = queue(clock, stop_grace_s=30)
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.cancel(job.id)
    clock.now += 10
    jobs.ping("a", [])
    clock.now += 100
    jobs.ping("a", [])
    assert jobs.unresponsive_workers() == set()


def test_stop_signals_of_a_silent_worker_are_removed_with_their_jobs() -> None:
    clock = FakeClock()
    jobs = queue(clock)
    for _ in range(10):
        job = submit(jobs, retention_s=110)
        jobs.take("silent", 1)
        jobs.cancel(job.id)
        clock.now += 50
        jobs.expire()
    assert (len(jobs._stop_requested_at["silent"]), len(jobs._stop_signals["silent"])) == (2, 2)
    clock.now += 110
    jobs.expire()
    assert not any((*jobs._stop_requested_at.values(), *jobs._stop_signals.values()))


def test_stop_signals_of_an_earlier_worker_are_removed_with_the_job() -> None:
    clock = FakeClock()
    jobs = queue(clock, execution_timeout_s=10)
    job = submit(jobs, retention_s=100)
    jobs.take("silent", 1)
    clock.now += 10
    jobs.expire()
    jobs.retry(job.id)
    jobs.take("other", 1)
    jobs.finish("other", job.id, "done")
    assert jobs._stop_requested_at.keys() == {"silent"}
    clock.now += 101
    jobs.expire()
    assert not any((*jobs._stop_requested_at.values(), *jobs._stop_signals.values()))


def test_a_waiting_job_times_out_after_its_ttl() -> None:
    clock = FakeClock()
    jobs = queue(clock)
    job = submit(jobs, ttl=10_000)
    clock.now += 9.999
    jobs.expire()
    assert job.document()["status"] == "IN_QUEUE"
    clock.now += 0.001
    jobs.expire()
    assert job.status is JobStatus.TIMED_OUT
    assert "executionTime" not in job.document()


def test_the_ttl_counts_from_the_submission_and_times_out_a_running_job() -> None:
    clock = FakeClock()
    jobs = queue(clock)
    job = submit(jobs, ttl=10_000)
    clock.now += 8
    jobs.take("a", 1)
    clock.now += 2
    jobs.expire()
    assert job.status is JobStatus.TIMED_OUT
    assert jobs.pop_stop_signals("a") == [job.id]


def test_a_job_past_its_ttl_is_not_taken() -> None:
    clock = FakeClock()
    jobs = queue(clock)
    expired, valid = submit(jobs, ttl=10_000), submit(jobs)
    clock.now += 10
    assert jobs.take("a", 1) == [valid]
    assert expired.status is JobStatus.TIMED_OUT


def test_a_run_past_the_execution_timeout_times_out_with_a_stop_signal() -> None:
    clock = FakeClock()
    jobs = queue(clock, lost_after_s=1e9)
    short, default = submit(jobs, executionTimeout=5_000), submit(jobs)
    jobs.take("a", 2)
    clock.now += 5
    jobs.expire()
    assert (short.status, short.error) == (JobStatus.TIMED_OUT, "executionTimeout exceeded")
    assert default.document()["status"] == "IN_PROGRESS"
    assert jobs.pop_stop_signals("a") == [short.id]
    clock.now += 595
    jobs.expire()
    assert default.status is JobStatus.TIMED_OUT


def test_a_retried_job_starts_over_under_its_id() -> None:
    clock = FakeClock()
    jobs = queue(clock)
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.stream("a", job.id, "half")
    jobs.finish("a", job.id, None, "it broke")
    clock.now += 5
    assert jobs.retry(job.id) is job
    assert job.document() == {"id": job.id, "status": "IN_QUEUE"}
    jobs.take("b", 1)
    jobs.finish("b", job.id, "done")
    assert job.document()["output"] == "done"
    assert job.document()["delayTime"] == 0
    assert jobs.read_stream(job) == []


def test_only_failed_and_timed_out_jobs_can_be_retried() -> None:
    jobs = queue(FakeClock())
    waiting, running, done, cancelled = (submit(jobs) for _ in range(4))
    jobs.cancel(cancelled.id)
    jobs.take("a", 3)
    jobs.on_worker_lost("a")
    jobs.take("a", 3)
    jobs.finish("a", done.id, "done")
    for job in (waiting, running, done, cancelled):
        with pytest.raises(JobStateError):
            jobs.retry(job.id)


def test_a_stop_signal_of_an_earlier_run_does_not_stop_the_next() -> None:
    clock = FakeClock()
    jobs = queue(clock, lost_after_s=1e9)
    job = submit(jobs, executionTimeout=5_000)
    jobs.take("a", 1)
    clock.now += 5
    jobs.expire()
    jobs.retry(job.id)
    jobs.take("a", 1)
    assert jobs.pop_stop_signals("a") == []
    clock.now += 31
    jobs.ping("a", [job.id])
    assert jobs.unresponsive_workers() == set()


def test_a_purge_cancels_waiting_jobs_and_keeps_running_jobs() -> None:
    jobs = queue(FakeClock())
    running, *waiting = (submit(jobs) for _ in range(3))
    jobs.take("a", 1)
    assert jobs.purge() == 2
    assert running.status is JobStatus.IN_PROGRESS
    assert {job.status for job in waiting} == {JobStatus.CANCELLED}
    assert jobs.purge() == 0


def test_a_result_is_removed_after_its_retention() -> None:
    clock = FakeClock()
    jobs = queue(clock)
    job = submit(jobs, retention_s=60)
    jobs.take("a", 1)
    jobs.finish("a", job.id, "done")
    clock.now += 59
    jobs.expire()
    assert jobs.job(job.id) is job
    clock.now += 1
    jobs.expire()
    with pytest.raises(NotFoundError):
        jobs.job(job.id)


def test_a_results_retention_can_be_shortened() -> None:
    clock = FakeClock()
    jobs = queue(clock)
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.finish("a", job.id, "done")
    clock.now += 100
    jobs.set_result_ttl(job, 6)
    clock.now += 5
    jobs.expire()
    assert jobs.job(job.id) is job
    clock.now += 1
    jobs.expire()
    with pytest.raises(NotFoundError):
        jobs.job(job.id)


def test_a_full_queue_rejects_jobs() -> None:
    jobs = queue(FakeClock(), max_workers=0)
    for _ in range(51):
        submit(jobs)
    with pytest.raises(TooManyRequestsError):
        submit(jobs)
    (job,) = jobs.take("a", 1)
    jobs.finish("a", job.id, error="it broke")
    submit(jobs)
    with pytest.raises(TooManyRequestsError):
        jobs.retry(job.id)
    assert job.status is JobStatus.FAILED


def test_low_priority_jobs_do_not_count_as_load() -> None:
    clock = FakeClock()
    jobs = queue(clock)
    submit(jobs, lowPriority=True)
    clock.now += 5
    submit(jobs)
    clock.now += 2
    load = jobs.load()
    assert (load.waiting, load.running, load.longest_wait_s) == (1, 0, 2)
    jobs.take("a", 2)
    load = jobs.load()
    assert (load.waiting, load.running, load.longest_wait_s) == (0, 1, 0)


def test_the_wait_of_a_requeued_job_counts_from_its_return() -> None:
    clock = FakeClock()
    jobs = queue(clock)
    submit(jobs)
    jobs.take("a", 1)
    clock.now += 30
    jobs.on_worker_lost("a")
    clock.now += 1
    assert jobs.load().longest_wait_s == 1


def test_the_listener_is_notified_of_every_change_and_end() -> None:
    listener = RecordingListener()
    jobs = JobQueue(QueueSettings(), FakeClock(), listener)
    job = jobs.submit(submission(), retention_s=60)
    assert listener.topics == [JOBS_QUEUED_TOPIC]
    jobs.take("a", 1)
    jobs.cancel(job.id)
    assert listener.topics == [JOBS_QUEUED_TOPIC, job_topic(job.id), job_stop_topic("a"), job_topic(job.id)]
    assert listener.ended_jobs == [job.id]


@pytest.mark.parametrize(
    "policy",
    [{"executionTimeout": 4_999}, {"ttl": 9_999}, {"ttl": 604_800_001}, {"executionTimeout": 604_800_001}],
)
def test_a_policy_outside_the_documented_limits_is_invalid(policy: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(policy))):
        submission(**policy)


def test_ids_have_the_platforms_format() -> None:
    jobs = queue(FakeClock())
    uuid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    asynchronous = submit(jobs).id
    synchronous = jobs.submit(submission(), prefix="sync-", retention_s=60).id
    assert re.fullmatch(f"{uuid}-u1", asynchronous)
    assert re.fullmatch(f"sync-{uuid}-u1", synchronous)
