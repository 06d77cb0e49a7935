"""The queue of a service, without I/O: leases, acknowledgements, answers."""

from __future__ import annotations

import base64
import json

import pytest

from emulator.errors import NotFoundError
from emulator.spirit.task import Task, TaskStatus, proxied_body
from emulator.spirit.task_queue import TASKS_QUEUED_TOPIC, TaskQueue, TaskQueueSettings, task_topic
from tests.unit.emulator.fakes import FakeClock


class Harness:
    """A queue with a fake clock; also its listener."""

    def __init__(self, lost_after_s: float = 20.0, max_retries: int = 1, retention_s: float = 1800.0) -> None:
        self.clock = FakeClock()
        self.topics: list[str] = []
        settings = TaskQueueSettings(lost_after_s, max_retries, retention_s)
        self.queue = TaskQueue(settings, self.clock, lambda: 1_700_000_000.25, self)

    def on_change(self, topic: str) -> None:
        self.topics.append(topic)

    def submit(self, **fields: str) -> Task:
        return self.queue.submit(fields.get("mode", "sync"), "sync", b'{"input": 1}', 180)  # type: ignore[arg-type]

    def taken(self, worker: str = "w1") -> Task:
        task = self.submit()
        assert self.queue.take(worker) is task
        return task

    def advance(self, seconds: float) -> None:
        self.clock.now += seconds
        self.queue.expire()


def test_a_task_is_given_out_with_all_headers_as_text() -> None:
    task = Harness().queue.submit("async", "async", b'{"input": 1}', 900, "http://hook")
    document = task.worker_document()
    assert document["headers"] == {
        "Ease-Mode": "async",
        "Ease-Webhook": "http://hook",
        "Ease-Request-Id": task.id,
        "Ease-Enqueue-At": "1700000000250",
        "Ease-Create-At": "1700000000250",
        "Ease-Status-Subject": f"status.{task.id}",
        "Ease-Time-To-Live": "900000",
    }
    assert base64.b64decode(document["body"]) == b'{"input": 1}'


def test_a_proxied_request_has_no_other_keys_than_the_sdk_reads() -> None:
    body = json.loads(proxied_body("GET", "/v1/models?a=b", {"X": ["1", "2"]}, b""))
    assert body == {"method": "GET", "uri": "/v1/models?a=b", "header": {"X": ["1", "2"]}, "body": ""}


def test_tasks_are_taken_in_order_and_counted() -> None:
    harness = Harness()
    first, second = harness.submit(), harness.submit()
    assert harness.topics == [TASKS_QUEUED_TOPIC] * 2
    harness.clock.now += 7
    load = harness.queue.load()
    assert (load.waiting, load.running, load.longest_wait_s) == (2, 0, 7)
    assert [harness.queue.take("w1"), harness.queue.take("w2"), harness.queue.take("w1")] == [first, second, None]
    assert (harness.queue.in_queue, harness.queue.in_progress, first.delay_ms) == (0, 2, 7000)
    assert harness.queue.running_jobs("w2") == [second]


def test_an_acknowledgement_ends_a_task_without_an_answer_too() -> None:
    """The client, who has none, waits on: nothing else is known to the platform."""
    harness = Harness()
    task = harness.taken()
    harness.clock.now += 3
    harness.queue.ack(task.id)
    assert (task.acked, task.ended_at, task.execution_ms, task.result_status) == (True, harness.clock.now, 3000, None)
    assert harness.queue.in_progress == 0
    assert task_topic(task.id) in harness.topics


def test_an_answer_does_not_end_a_task() -> None:
    harness = Harness()
    task = harness.taken()
    assert harness.queue.begin_answer("w1", task.id, "request-result", 200) is task
    harness.queue.set_result(task, "", b'"ok"')
    harness.queue.metric(task.id, TaskStatus.SUCCEED, "succeed")
    assert task.ended_at is None
    assert task.status_document("id")["result"] == base64.b64encode(b'"ok"').decode()


def test_the_first_answer_is_heard_and_all_are_recorded() -> None:
    harness = Harness()
    task = harness.taken()
    assert harness.queue.begin_answer("w1", task.id, "request-proxy", 404) is task
    assert harness.queue.begin_answer("w1", task.id, "request-proxy", 500) is None
    assert (task.result_status, [answer.status for answer in task.answers]) == (404, [404, 500])


def test_calls_for_an_unknown_task_do_nothing() -> None:
    queue = Harness().queue
    queue.ack("no-such-task")
    queue.metric("no-such-task", TaskStatus.SUCCEED, "")
    assert queue.begin_answer("w1", "no-such-task", "request-result", 200) is None
    assert queue.health()["completed"] == 0


@pytest.mark.parametrize("named", [True, False])
def test_a_task_is_leased_as_long_as_heartbeats_name_it(named: bool) -> None:
    harness = Harness(lost_after_s=20)
    task = harness.taken()
    for _ in range(10):
        harness.queue.heartbeat("w1", [task.id] if named else [])
        harness.advance(5)
    assert (task.worker, harness.queue.in_queue) == (("w1", 0) if named else (None, 1))


def test_another_workers_heartbeat_extends_no_lease() -> None:
    harness = Harness(lost_after_s=20)
    task = harness.taken()
    harness.clock.now += 19
    harness.queue.heartbeat("w2", [task.id])
    harness.advance(1)
    assert (harness.queue.in_queue, task.retries) == (1, 1)


def test_a_lost_workers_tasks_return_to_the_head_in_their_order() -> None:
    harness = Harness()
    tasks = [harness.submit() for _ in range(3)]
    assert [harness.queue.take("w1"), harness.queue.take("w1")] == tasks[:2]
    harness.queue.on_worker_lost("w1")
    assert [harness.queue.take("w2") for _ in range(3)] == tasks
    assert harness.queue.health()["retried"] == 2


def test_without_redelivery_a_lost_workers_task_is_lost() -> None:
    harness = Harness(max_retries=0)
    task = harness.taken()
    harness.queue.on_worker_lost("w1")
    assert (harness.queue.in_queue, harness.queue.in_progress) == (0, 0)
    document = task.status_document("id")
    assert (document["statusCode"], document["status"], document["message"]) == (500, "failed", "lost with its worker")


def test_an_acknowledgement_of_the_first_run_ends_a_task_that_was_queued_again() -> None:
    harness = Harness(lost_after_s=5)
    task = harness.taken()
    harness.advance(5)
    assert harness.queue.in_queue == 1
    harness.queue.ack(task.id)
    assert (harness.queue.in_queue, task.ended_at) == (0, harness.clock.now)


def test_an_expired_task_is_given_out_since_its_worker_drops_it() -> None:
    harness = Harness()
    task = harness.submit()
    harness.advance(10_000)
    assert harness.queue.take("w1") is task


def test_only_an_async_task_that_waits_is_cancelled_and_only_with_its_sequence() -> None:
    harness = Harness()
    waiting, sync = harness.submit(mode="async"), harness.submit()
    for task_id, sequence in ((waiting.id, waiting.sequence + 1), (sync.id, sync.sequence), ("no-such-task", 1)):
        with pytest.raises(NotFoundError):
            harness.queue.cancel(task_id, sequence)
    harness.queue.cancel(waiting.id, waiting.sequence)
    assert (waiting.status, harness.queue.take("w1")) == (TaskStatus.FAILED, sync)
    with pytest.raises(NotFoundError):
        harness.queue.cancel(waiting.id, waiting.sequence)


def test_cleaning_removes_the_async_tasks_that_wait() -> None:
    harness = Harness()
    running = harness.submit(mode="async")
    harness.queue.take("w1")
    waiting, sync = harness.submit(mode="async"), harness.submit()
    assert harness.queue.clean() == [waiting.id]
    assert (running.ended_at, sync.ended_at, harness.queue.in_queue) == (None, None, 1)


def test_a_task_is_kept_for_the_retention_after_its_end() -> None:
    harness = Harness(retention_s=1800)
    task = harness.taken()
    harness.advance(10)
    harness.queue.heartbeat("w1", [task.id])
    harness.queue.ack(task.id)
    harness.advance(1799)
    assert harness.queue.task(task.id) is task
    harness.advance(2)
    assert harness.queue.task(task.id) is None
