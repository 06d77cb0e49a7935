"""The platform's own API for clients, over HTTP: what API.md documents, with its errors' texts."""

from __future__ import annotations

import base64
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.unit.emulator.conftest import disconnect_when, wait_until
from tests.unit.emulator.spirit.conftest import ID, SpiritSite, Start

_NOT_A_REQUEST = "invalid request data, must be a json object with 'input' and 'webhook' (optional)"
_HOOK = "http://127.0.0.1:1/hook"


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]


def test_a_sync_request_is_answered_with_the_workers_result_itself(site: SpiritSite) -> None:
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(site.native.post, "/sync", json={"input": {"a": 1}, "extra": 2})
        task = site.taken()
        assert task["parsed"] == {"input": {"a": 1}, "extra": 2}
        assert task["headers"]["Ease-Mode"] == "sync"
        assert task["headers"]["Ease-Time-To-Live"] == "180000"
        assert site.result(task["id"], b'{"b": 2}').status_code == 200
        assert response.result(10).json() == {"b": 2}


@pytest.mark.parametrize(
    ("status", "expected"),
    [(408, (408, "request timeout")), (500, (500, "failed to handle message {id}: it broke"))],
)
def test_a_workers_failure_has_its_documented_answer(site: SpiritSite, status: int, expected: tuple[int, str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(site.native.post, "/sync", json={"input": 1})
        task_id = site.taken()["id"]
        site.result(task_id, b'{"error": "it broke"}', status, "it broke")
        assert error(response.result(10)) == (expected[0], expected[1].format(id=task_id))


def test_a_sync_request_times_out_without_a_result(start: Start) -> None:
    """Also if its worker has acknowledged it, as the SDK does with a body that it cannot read."""
    site = start(syncTtl=0.3)
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(site.native.post, "/sync", json={"input": 1})
        task_id = site.taken()["id"]
        site.metric(task_id, "failed", "failed to parse")
        site.ack(task_id)
        assert error(response.result(10)) == (408, "request timeout")


def test_a_sync_client_that_leaves_does_not_take_its_task_along(site: SpiritSite) -> None:
    disconnect_when(
        lambda: site.endpoint.queue.in_queue, site.native, "POST", f"{site.native.base_url}sync", {"input": 1}
    )
    assert site.taken()["parsed"] == {"input": 1}


def test_an_async_request_is_answered_at_once_and_its_state_can_be_asked_for(site: SpiritSite) -> None:
    document = site.native.post("/async", json={"input": 1, "webhook": _HOOK}).json()
    task_id = document["id"]
    assert document == {"id": task_id, "sequence": "1"}
    assert site.native.get("/status").json() == {"queueingCount": 1}
    task = site.taken()
    assert (task["headers"]["Ease-Mode"], task["headers"]["Ease-Time-To-Live"]) == ("async", "900000")
    assert task["parsed"]["webhook"] == _HOOK
    assert site.native.get("/status").json() == {"queueingCount": 0}

    site.metric(task_id, "executing", "start executing")
    running = {"statusCode": 200, "serverlessID": ID, "requestID": task_id, "status": "executing"}
    status = site.native.get("/status", params={"requestID": task_id})
    assert status.json() == {**running, "message": "start executing", "result": None}

    site.result(task_id, b"[1]")
    site.metric(task_id, "succeed", "succeed")
    result = base64.b64encode(b"[1]").decode()
    succeeded = {**running, "status": "succeed", "message": "succeed", "result": result}
    assert site.native.get("/status", params={"requestID": task_id}).json() == succeeded
    statuses = site.native.post("/status", json={"requestIDs": [task_id, "unknown"]}).json()["statuses"]
    assert [status["statusCode"] for status in statuses] == [200, 404]
    assert statuses[0] == succeeded


def test_a_result_is_kept_for_the_retention_only(start: Start) -> None:
    site = start(retention=0)
    task_id = site.submit()
    site.ack(site.taken()["id"])

    def status() -> int:
        return int(site.native.get("/status", params={"requestID": task_id}).json()["statusCode"])

    wait_until(lambda: status() == 404)


def test_the_ttl_of_an_async_request_is_its_policys(site: SpiritSite) -> None:
    site.submit(policy={"ttl": 1500})
    assert site.taken()["headers"]["Ease-Time-To-Live"] == "1500"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/sync", b"not json", _NOT_A_REQUEST),
        ("/sync", b"[1]", _NOT_A_REQUEST),
        ("/sync", b'{"inputs": 1}', _NOT_A_REQUEST),
        ("/async", b'{"webhook": "http://hook"}', _NOT_A_REQUEST),
        ("/async", b'{"input": 1}', "webhook is empty for async request"),
        ("/async", b'{"input": 1, "webhook": ""}', "webhook is empty for async request"),
        ("/async", b'{"input": 1, "webhook": "http://hook", "policy": {"ttl": 86400000}}', "invalid request arguments"),
        ("/async", b'{"input": 1, "webhook": "http://hook", "policy": {"ttl": "1"}}', "invalid request arguments"),
        ("/status", b'{"requestIDs": "one"}', "invalid request arguments"),
    ],
)
def test_an_invalid_request_is_refused_in_the_documented_words(
    site: SpiritSite, path: str, body: bytes, message: str
) -> None:
    assert error(site.native.post(path, content=body)) == (400, message)


def test_a_body_above_the_limit_is_refused(start: Start) -> None:
    site = start(maxBody=100)
    assert error(site.native.post("/sync", json={"input": "x" * 100})) == (400, "request body too large")
    assert error(site.proxied.post("/v1/completions", json={"p": "x" * 100})) == (400, "request body too large")


@pytest.mark.parametrize(("mode", "setting"), [("sync", "maxSyncResult"), ("async", "maxAsyncResult")])
def test_a_result_above_the_limit_is_not_kept(start: Start, mode: str, setting: str) -> None:
    site = start(**{setting: 3})
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(site.native.post, f"/{mode}", json={"input": 1, "webhook": _HOOK})
        task_id = site.taken()["id"]
        assert site.result(task_id, b"1234").status_code == 200
        if mode == "sync":
            message = f"failed to handle message {task_id}: the result exceeds 3 bytes"
            assert error(response.result(10)) == (500, message)
    status = site.native.get("/status", params={"requestID": task_id}).json()
    assert (status["result"], status["message"]) == (None, "the result exceeds 3 bytes")


def test_without_a_worker_that_can_come_sync_requests_are_refused(start: Start) -> None:
    """Async ones are queued."""
    site = start(agentPorts=[])
    refused = (503, "not enough gpu now, please try again later")
    assert error(site.native.post("/sync", json={"input": 1})) == refused
    assert error(site.proxied.get("/v1/models")) == refused
    site.submit()
    assert site.native.get("/status").json() == {"queueingCount": 1}


def test_a_task_that_waits_is_cancelled_by_id_and_sequence(site: SpiritSite) -> None:
    document = site.native.post("/async", json={"input": 1, "webhook": _HOOK}).json()
    query: dict[str, Any] = {"requestID": document["id"], "sequence": document["sequence"]}
    assert error(site.native.delete("/async", params={"requestID": document["id"]})) == (
        400,
        "invalid request arguments",
    )
    assert site.native.delete("/async", params=query).json().keys() == {"id"}
    assert error(site.native.delete("/async", params=query)) == (500, "failed to cancel message(s)")
    assert site.take() is None


def test_the_queue_is_emptied(site: SpiritSite) -> None:
    ids = [site.submit(), site.submit()]
    assert site.native.delete("/async").json()["cleaned"] == ids
    assert site.take() is None


@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "a-key-of-the-tests", f"{ID}-a-key-of-the-tests"])
def test_the_key_is_required_as_a_bearer(site: SpiritSite, authorization: str) -> None:
    response = site.native.get("/status", headers={"Authorization": authorization})
    assert response.status_code == 401
    assert "error" in response.json()


def test_many_clients_get_their_own_results(site: SpiritSite) -> None:
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            if task := site.take():
                site.result(task["id"], json.dumps(task["parsed"]["input"]).encode())
                site.ack(task["id"])

    worker = threading.Thread(target=work)
    worker.start()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: site.native.post("/sync", json={"input": number}).json(), range(40)))
    done.set()
    worker.join()
    assert answers == list(range(40))
