"""The queue, rule by rule; `test_queue_machine.py` has any order of them."""

from __future__ import annotations

import re

import pytest

from emulator.core.job import JobStatus
from emulator.core.job_queue import JOBS_QUEUED_TOPIC, JobQueue, QueueSettings, job_topic, stop_topic
from emulator.errors import JobNotAssignedError, JobStateError, NotFoundError, TooManyRequestsError
from tests.unit.emulator.fakes import Clock, RecordingListener, queue, submission, submit


def test_jobs_are_taken_in_the_order_of_their_submission() -> None:
    jobs = queue(Clock())
    submitted = [submit(jobs).id for _ in range(3)]
    assert [job.id for job in jobs.take("a", 2)] == submitted[:2]
    assert [job.id for job in jobs.take("b", 2)] == submitted[2:]
    assert jobs.take("b", 2) == []


def test_a_finished_job_has_its_output_and_its_times() -> None:
    clock = Clock()
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


def test_a_job_that_waits_shows_nothing_but_its_state() -> None:
    jobs = queue(Clock())
    job = submit(jobs)
    assert job.document() == {"id": job.id, "status": "IN_QUEUE"}


def test_progress_is_shown_while_the_job_runs() -> None:
    jobs = queue(Clock())
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
def test_a_delivery_by_a_worker_that_does_not_hold_the_job_is_refused(deliver: str) -> None:
    jobs = queue(Clock())
    job = submit(jobs)
    jobs.take("a", 1)
    with pytest.raises(JobNotAssignedError):
        getattr(jobs, deliver)("b", job.id, "output")
    assert job.status is JobStatus.IN_PROGRESS
    assert job.outputs == []


def test_a_second_result_is_refused() -> None:
    jobs = queue(Clock())
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.finish("a", job.id, "first")
    with pytest.raises(JobNotAssignedError):
        jobs.finish("a", job.id, "second")
    assert job.output == "first"


def test_each_output_is_read_once() -> None:
    jobs = queue(Clock())
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.stream("a", job.id, 1)
    jobs.stream("a", job.id, 2)
    assert jobs.read_stream(job) == [1, 2]
    jobs.stream("a", job.id, 3)
    assert jobs.read_stream(job) == [3]
    assert jobs.read_stream(job) == []


def test_a_lost_workers_jobs_go_to_the_head_of_the_queue_in_their_order() -> None:
    jobs = queue(Clock())
    first, second, third = (submit(jobs) for _ in range(3))
    jobs.take("a", 2)
    jobs.on_worker_lost("a")
    assert [job.id for job in jobs.take("b", 3)] == [first.id, second.id, third.id]
    assert jobs.health()["retried"] == 2
    assert first.document()["retries"] == 1
    assert "retries" not in third.document()


def test_a_job_that_is_lost_once_too_often_fails_in_the_platforms_words() -> None:
    jobs = queue(Clock(), max_retries=1)
    job = submit(jobs)
    for worker in ("a", "b"):
        jobs.take(worker, 1)
        jobs.on_worker_lost(worker)
    assert (job.status, job.error) == (JobStatus.FAILED, "job timed out after 1 retries")
    assert jobs.health() == {"completed": 0, "failed": 1, "inProgress": 0, "inQueue": 0, "retried": 1}


def test_a_lost_jobs_outputs_are_gone_with_its_worker() -> None:
    jobs = queue(Clock())
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.stream("a", job.id, "half an ans")
    jobs.on_worker_lost("a")
    jobs.take("b", 1)
    jobs.stream("b", job.id, "an answer")
    assert jobs.read_stream(job) == ["an answer"]


def test_a_job_that_its_workers_pings_do_not_name_is_lost() -> None:
    clock = Clock()
    jobs = queue(clock, lost_after_s=40)
    kept, dropped = submit(jobs), submit(jobs)
    jobs.take("a", 2)
    for _ in range(4):
        clock.now += 10
        jobs.ping("a", [kept.id])
        jobs.expire()
    assert kept.status is JobStatus.IN_PROGRESS
    assert dropped.status is JobStatus.IN_QUEUE


def test_outputs_show_that_a_worker_has_the_job() -> None:
    clock = Clock()
    jobs = queue(clock, lost_after_s=40)
    job = submit(jobs)
    jobs.take("a", 1)
    for _ in range(3):
        clock.now += 30
        jobs.stream("a", job.id, "more")
        jobs.expire()
    assert job.status is JobStatus.IN_PROGRESS


def test_a_running_job_is_cancelled_and_its_worker_told_once() -> None:
    jobs = queue(Clock())
    job = submit(jobs)
    jobs.take("a", 1)
    assert jobs.cancel(job.id).status is JobStatus.CANCELLED
    assert jobs.pop_stop_signals("a") == [job.id]
    assert jobs.pop_stop_signals("a") == []
    with pytest.raises(JobNotAssignedError):
        jobs.finish("a", job.id, "too late")


def test_a_waiting_job_is_cancelled_without_a_word_to_any_worker() -> None:
    jobs = queue(Clock())
    job = submit(jobs)
    jobs.cancel(job.id)
    assert job.status is JobStatus.CANCELLED
    assert jobs.take("a", 1) == []
    assert jobs.pop_stop_signals("a") == []


def test_cancelling_a_job_that_has_ended_changes_nothing() -> None:
    jobs = queue(Clock())
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.finish("a", job.id, "done")
    assert jobs.cancel(job.id).status is JobStatus.COMPLETED
    assert job.output == "done"


def test_a_worker_that_still_shows_a_stopped_job_after_its_grace_disobeys() -> None:
    clock = Clock()
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


def test_a_worker_that_lets_a_stopped_job_go_obeys() -> None:
    clock = Clock()
    jobs = queue(clock, stop_grace_s=30)
    job = submit(jobs)
    jobs.take("a", 1)
    jobs.cancel(job.id)
    clock.now += 10
    jobs.ping("a", [])
    clock.now += 100
    jobs.ping("a", [])
    assert jobs.unresponsive_workers() == set()


def test_a_worker_that_never_asks_nor_pings_is_remembered_no_longer_than_its_jobs() -> None:
    clock = Clock()
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


def test_a_job_that_is_retried_elsewhere_leaves_nothing_of_its_first_worker() -> None:
    clock = Clock()
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


def test_a_job_whose_time_to_live_is_over_times_out_where_it_waits() -> None:
    clock = Clock()
    jobs = queue(clock)
    job = submit(jobs, ttl=10_000)
    clock.now += 9.999
    jobs.expire()
    assert job.document()["status"] == "IN_QUEUE"
    clock.now += 0.001
    jobs.expire()
    assert job.status is JobStatus.TIMED_OUT
    assert "executionTime" not in job.document()


def test_the_time_to_live_counts_from_the_submission_and_ends_a_running_job_too() -> None:
    clock = Clock()
    jobs = queue(clock)
    job = submit(jobs, ttl=10_000)
    clock.now += 8
    jobs.take("a", 1)
    clock.now += 2
    jobs.expire()
    assert job.status is JobStatus.TIMED_OUT
    assert jobs.pop_stop_signals("a") == [job.id]


def test_a_job_whose_time_to_live_is_over_is_not_given_out() -> None:
    clock = Clock()
    jobs = queue(clock)
    late, fresh = submit(jobs, ttl=10_000), submit(jobs)
    clock.now += 10
    assert jobs.take("a", 1) == [fresh]
    assert late.status is JobStatus.TIMED_OUT


def test_a_run_above_the_execution_timeout_times_out_and_its_worker_is_told() -> None:
    clock = Clock()
    jobs = queue(clock, lost_after_s=1e9)
    own, endpoints = submit(jobs, executionTimeout=5_000), submit(jobs)
    jobs.take("a", 2)
    clock.now += 5
    jobs.expire()
    assert (own.status, own.error) == (JobStatus.TIMED_OUT, "executionTimeout exceeded")
    assert endpoints.document()["status"] == "IN_PROGRESS"
    assert jobs.pop_stop_signals("a") == [own.id]
    clock.now += 595
    jobs.expire()
    assert endpoints.status is JobStatus.TIMED_OUT


def test_a_retried_job_begins_anew_under_its_id() -> None:
    clock = Clock()
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
    jobs = queue(Clock())
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
    clock = Clock()
    jobs = queue(clock, lost_after_s=1e9)
    job = submit(jobs, executionTimeout=5_000)
    jobs.take("a", 1)
    clock.now += 5
    jobs.expire()
    jobs.retry(job.id)
    jobs.take("a", 1)
    assert jobs.pop_stop_signals("a") == []


def test_a_purge_removes_what_waits_and_leaves_what_runs() -> None:
    jobs = queue(Clock())
    running, *waiting = (submit(jobs) for _ in range(3))
    jobs.take("a", 1)
    assert jobs.purge() == 2
    assert running.status is JobStatus.IN_PROGRESS
    assert {job.status for job in waiting} == {JobStatus.CANCELLED}
    assert jobs.purge() == 0


def test_a_result_is_forgotten_when_its_retention_is_over() -> None:
    clock = Clock()
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


def test_a_result_can_be_kept_for_less() -> None:
    clock = Clock()
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


def test_a_full_queue_refuses_jobs() -> None:
    jobs = queue(Clock(), max_workers=0)
    for _ in range(51):
        submit(jobs)
    with pytest.raises(TooManyRequestsError):
        submit(jobs)
    jobs.take("a", 1)
    submit(jobs)


def test_jobs_of_low_priority_are_no_load() -> None:
    clock = Clock()
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


def test_a_retried_jobs_wait_counts_from_its_return() -> None:
    clock = Clock()
    jobs = queue(clock)
    submit(jobs)
    jobs.take("a", 1)
    clock.now += 30
    jobs.on_worker_lost("a")
    clock.now += 1
    assert jobs.load().longest_wait_s == 1


def test_those_who_wait_are_told_of_what_they_wait_for() -> None:
    told = RecordingListener()
    jobs = JobQueue(QueueSettings(), Clock(), told)
    job = jobs.submit(submission(), retention_s=60)
    assert told.topics == [JOBS_QUEUED_TOPIC]
    jobs.take("a", 1)
    jobs.cancel(job.id)
    assert told.topics == [JOBS_QUEUED_TOPIC, job_topic(job.id), stop_topic("a"), job_topic(job.id)]
    assert told.ends == [job.id]


@pytest.mark.parametrize(
    "policy",
    [{"executionTimeout": 4_999}, {"ttl": 9_999}, {"ttl": 604_800_001}, {"executionTimeout": 604_800_001}],
)
def test_a_policy_beyond_the_documented_bounds_is_refused(policy: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(policy))):
        submission(**policy)


def test_ids_have_the_platforms_form() -> None:
    jobs = queue(Clock())
    uuid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    asynchronous = submit(jobs).id
    synchronous = jobs.submit(submission(), prefix="sync-", retention_s=60).id
    assert re.fullmatch(f"{uuid}-u1", asynchronous)
    assert re.fullmatch(f"sync-{uuid}-u1", synchronous)
