"""The stock SDK (spirit-gpu 0.1.0) with a trivial handler against the emulator: what works, and its faults.

The tests document each fault, which this repository's own worker must not have.
"""

from __future__ import annotations

import base64
import json
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.integration.emulator.conftest import eventually
from tests.integration.emulator.spirit.conftest import Site, Start, Webhook


def exited(site: Site) -> dict[str, Any]:
    """Wait until a worker has exited; return it."""

    def poll() -> list[dict[str, Any]]:
        state = site.state()
        return [worker for worker in (*state["gone"], *state["workers"]) if worker["exitCode"] is not None]

    return eventually(poll)[0]


def answered(site: Site, task_id: str) -> dict[str, Any]:
    """Wait until a task has a result; return its state."""
    return eventually(lambda: site.status(task_id) if site.status(task_id)["result"] else {})


def test_sync_async_and_webhook(start_handler: Start, webhook: Webhook) -> None:
    site = start_handler()
    site.idle_worker()
    response = site.sync({"echo": [1, "zwei"]})
    assert (response.status_code, response.json()["echo"]) == (200, [1, "zwei"])

    task_id = site.submit({"echo": 3}, webhook.url)
    state = answered(site, task_id)
    assert (state["statusCode"], json.loads(base64.b64decode(state["result"]))) == (200, {"echo": 3, "id": task_id})
    assert webhook.received == [(task_id, 200, {"echo": 3, "id": task_id})]
    eventually(lambda: site.status(task_id)["status"] == "succeed")
    assert [task["status"] for task in site.ended(2)] == ["succeed", "succeed"]


def test_a_sync_requests_webhook_gets_the_result_too(start_handler: Start, webhook: Webhook) -> None:
    site = start_handler()
    body = {"input": {"echo": 1}, "webhook": webhook.url}
    response = site.native.post("/sync", json=body).json()
    assert webhook.received == [(response["id"], 200, response)]


def test_a_hundred_requests_are_answered_by_two_workers(start_handler: Start) -> None:
    options = {"workersMin": 0, "workersMax": 2, "scalerType": "QUEUE_LENGTH", "scalerValue": 10}
    site = start_handler(**options, env={"CONCURRENCY": "20"})
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda number: site.sync({"echo": number, "sleep": 0.1}).json()["echo"], range(100)))
    assert answers == list(range(100))
    assert Counter(task["status"] for task in site.ended(100)) == {"succeed": 100}
    assert len({task["workerId"] for task in site.state()["jobs"]}) == 2


def test_a_worker_is_added_by_waiting_time_and_stopped_when_idle(start_handler: Start) -> None:
    site = start_handler(workersMin=0, scalerType="QUEUE_DELAY", scalerValue=0.5, idleTimeout=1)
    assert site.state()["workers"] == []
    assert site.sync({"echo": 1}).json()["echo"] == 1
    (task,) = site.ended()
    worker = exited(site)
    assert worker["startedAt"] - task["submittedAt"] >= 0.5
    assert worker["reason"] == "idle for 1 s"


def test_a_generators_yields_are_one_list_and_a_late_error_loses_them(start_handler: Start) -> None:
    """Nothing is streamed in this mode."""
    site = start_handler(env={"KIND": "generator"})
    site.idle_worker()
    assert site.sync({"yield": 3}).json() == [0, 1, 2]
    failed = site.sync({"yield": 3, "raise": "late"})
    assert failed.status_code == 500
    assert failed.json()["error"].endswith("default handler raise exception during running, err: late")


def test_an_error_reaches_the_client_and_the_webhook(start_handler: Start, webhook: Webhook) -> None:
    site = start_handler()
    message = "default handler raise exception during running, err: it broke"
    task_id = site.submit({"raise": "it broke"}, webhook.url)
    state = answered(site, task_id)
    assert (state["statusCode"], state["status"], state["message"]) == (500, "failed", message)
    assert webhook.received == [(task_id, 500, {"error": message})]


def test_an_expired_task_is_answered_with_408_and_not_run(start_handler: Start, webhook: Webhook) -> None:
    site = start_handler(workersMin=0, scalerValue=1)
    task_id = site.submit({"echo": 1}, webhook.url, policy={"ttl": 1})
    state = answered(site, task_id)
    assert (state["statusCode"], state["status"]) == (408, "failed")
    ((_, status, body),) = webhook.received
    assert (status, body["error"].startswith("request enqueue time exceed ttl 1 milliseconds")) == (408, True)


# Faults of the SDK.


def test_sigterm_ends_the_worker_at_once_and_its_task_has_no_answer(start_handler: Start) -> None:
    site = start_handler(maxRetries=0, syncTtl=6)
    worker = site.idle_worker()
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(site.sync, {"sleep": 60})
        eventually(lambda: site.state()["health"]["jobs"]["inProgress"])
        os.kill(worker["pid"], signal.SIGTERM)
        assert exited(site)["exitCode"] == -signal.SIGTERM
        assert response.result(60).json() == {"error": "request timeout"}


def test_a_killed_workers_task_is_redelivered_or_lost_as_the_settings_say(start_handler: Start) -> None:
    site = start_handler(maxRetries=1)
    worker = site.idle_worker()
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(site.sync, {"echo": 1, "sleep": 1})
        eventually(lambda: site.state()["health"]["jobs"]["inProgress"])
        site.root.post(f"/workers/{worker['id']}/kill").raise_for_status()
        assert response.result(60).json()["echo"] == 1
    (task,) = site.ended()
    assert (task["retries"], task["workerId"] == worker["id"]) == (1, False)


@pytest.mark.parametrize("kind", ["error", "drop"])
def test_a_result_is_posted_once_and_the_task_is_acknowledged_without_it(start_handler: Start, kind: str) -> None:
    """The agent is away for a moment: the answer is lost, and the state says that it succeeded."""
    site = start_handler(syncTtl=2)
    site.idle_worker()
    site.faults({"kind": kind, "route": "request-result", "times": 1})
    assert site.sync({"echo": 1}).json() == {"error": "request timeout"}
    (task,) = site.ended()
    assert (task["status"], task["outputs"]) == ("succeed", 0)
    assert site.sync({"echo": 2}).json()["echo"] == 2


@pytest.mark.parametrize("route", ["request-ack", "request-metric"])
def test_other_calls_are_made_once_too(start_handler: Start, route: str) -> None:
    """Without its acknowledgement a task is redelivered, once its lease is over, and so runs twice."""
    site = start_handler(lostAfter=2, heartbeatInterval=1)
    site.idle_worker()
    site.faults({"kind": "error", "route": route, "times": 1})
    assert site.sync({"echo": 1}).json()["echo"] == 1
    (task,) = site.ended()
    assert task["retries"] == (1 if route == "request-ack" else 0)


def test_a_body_that_cannot_be_read_gets_no_answer(start_handler: Start) -> None:
    """It is acknowledged all the same, and logged whole."""
    site = start_handler(syncTtl=2)
    site.idle_worker()
    body = base64.b64encode(b"the prompt, cut").decode()
    site.faults({"kind": "alter", "route": "request", "body": body, "times": 1})
    assert site.sync({"echo": 1}).json() == {"error": "request timeout"}
    (task,) = site.ended()
    assert (task["status"], task["outputs"]) == ("failed", 0)
    assert any("the prompt, cut" in line for line in site.log())


@pytest.mark.parametrize("headers", [{"Ease-Time-To-Live": ""}, {"Ease-Request-Id": ""}])
def test_a_task_with_an_odd_header_vanishes(start_handler: Start, headers: dict[str, str]) -> None:
    """No answer, no metric, no acknowledgement: its lease must end."""
    site = start_handler(syncTtl=10, lostAfter=2, heartbeatInterval=1)
    site.idle_worker()
    site.faults({"kind": "alter", "route": "request", "headers": headers, "times": 1})
    assert site.sync({"echo": 1}).json()["echo"] == 1
    (task,) = site.ended()
    assert task["retries"] == 1


def test_a_task_without_its_time_counts_as_expired(start_handler: Start) -> None:
    site = start_handler()
    site.idle_worker()
    site.faults({"kind": "alter", "route": "request", "headers": {"Ease-Enqueue-At": "0"}, "times": 1})
    assert (site.sync({"echo": 1}).status_code, site.sync({"echo": 1}).status_code) == (408, 200)


def test_an_unhealthy_agent_ends_an_idle_worker_with_1(start_handler: Start) -> None:
    site = start_handler()
    site.idle_worker()
    site.faults({"kind": "unhealthy", "route": "request", "times": 1})
    assert exited(site)["exitCode"] == 1


def test_a_task_that_comes_with_the_bad_news_is_lost(start_handler: Start) -> None:
    site = start_handler(workersMin=0, scalerType="QUEUE_LENGTH", scalerValue=1, maxRetries=0, syncTtl=5)
    site.faults({"kind": "unhealthy", "route": "request", "when": "after", "times": 1})
    assert site.sync({"echo": 1}).json() == {"error": "request timeout"}
    worker = exited(site)
    assert (worker["exitCode"], worker["jobsTaken"]) == (1, 1)


def test_a_cancelled_error_leaks_the_slot_and_the_worker_is_dead_but_looks_alive(start_handler: Start) -> None:
    """No answer and no acknowledgement; heartbeats name the task for ever, so its lease does not end."""
    site = start_handler(syncTtl=2, lostAfter=2, heartbeatInterval=1)
    worker = site.idle_worker()
    assert site.sync({"cancel": True}).json() == {"error": "request timeout"}
    assert site.sync({"echo": 1}).json() == {"error": "request timeout"}
    state = site.state()
    assert [(it["id"], it["state"]) for it in state["workers"]] == [(worker["id"], "running")]
    assert (state["health"]["jobs"]["inProgress"], state["health"]["jobs"]["inQueue"]) == (1, 1)


def test_a_handler_that_blocks_stops_all_but_heartbeats(start_handler: Start) -> None:
    site = start_handler(env={"CONCURRENCY": "4"})
    site.idle_worker()
    with ThreadPoolExecutor(2) as pool:
        blocking = pool.submit(site.sync, {"block": 2})
        eventually(lambda: site.state()["health"]["jobs"]["inProgress"])
        other = pool.submit(site.sync, {"echo": 1})
        assert blocking.result(60).status_code == other.result(60).status_code == 200
    first, second = sorted(site.ended(2), key=lambda task: float(task["submittedAt"]))
    assert second["takenAt"] >= first["firstOutputAt"]


def test_a_heartbeat_that_hangs_stops_heartbeats_for_good(start_handler: Start) -> None:
    """It has no timeout. The worker still takes and answers tasks; one that lasts is given out again meanwhile."""
    site = start_handler(lostAfter=3, heartbeatInterval=1, maxRetries=1, env={"CONCURRENCY": "4"})
    site.idle_worker()
    site.faults({"kind": "latency", "route": "heartbeat", "latency_ms": 600_000, "times": 1})
    eventually(lambda: site.root.get("/faults").json()["struck"] == [1])
    assert site.sync({"echo": 1, "sleep": 5}).json()["echo"] == 1
    assert site.ended(1)[0]["retries"] == 1


def test_a_task_that_is_delivered_twice_is_run_twice(start_handler: Start, webhook: Webhook) -> None:
    """One id in a set of running ids: a copy is a task like any other, and both post their results."""
    site = start_handler(env={"CONCURRENCY": "4"})
    site.idle_worker()
    site.faults({"kind": "duplicate", "route": "request", "times": 1})
    task_id = site.submit({"echo": 1, "sleep": 1}, webhook.url)
    eventually(lambda: len(webhook.received) == 2)
    assert {received[0] for received in webhook.received} == {task_id}


def test_a_webhook_that_fails_is_not_tried_again(start_handler: Start, webhook: Webhook) -> None:
    """The state says that the task failed, although its result was posted to the agent."""
    webhook.status = 503
    site = start_handler()
    task_id = site.submit({"echo": 1}, webhook.url)
    eventually(lambda: site.status(task_id)["status"] == "failed")
    state = site.status(task_id)
    assert state["result"] is not None
    assert "unsuccess status code 503 from webhook" in state["message"]
    assert len(webhook.received) == 1


def test_a_clients_meta_hides_the_request_id(start_handler: Start) -> None:
    site = start_handler()
    site.idle_worker()
    body = {"input": {"echo": 1}, "meta": {"requestID": "the client's"}}
    assert site.native.post("/sync", json=body).json()["id"] == "the client's"


def test_without_its_agent_the_worker_tries_for_ever_and_goes_on_when_it_is_back(start_handler: Start) -> None:
    site = start_handler()
    worker = site.idle_worker()
    site.faults({"kind": "drop", "route": "agent"})
    eventually(lambda: sum("failed to get task" in line for line in site.log()) >= 2)
    site.faults()
    assert site.sync({"echo": 1}).json()["echo"] == 1
    assert site.ended()[0]["workerId"] == worker["id"]


def test_the_worker_finds_its_agent_by_its_variables_alone(start_handler: Start) -> None:
    """An emulator starts workers with EASE_AGENT_URL, without any key."""
    site = start_handler(env={"EASE_AGENT_URL": "http://127.0.0.1:9"}, initTimeout=2)
    eventually(lambda: any("not ready after 2 s" in event["text"] for event in site.state()["events"]))
    with pytest.raises(httpx.TimeoutException):
        site.native.post("/sync", json={"input": {}}, timeout=1)
