"""The agent beside a worker, over HTTP: its six calls, its health, its faults."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.unit.emulator.conftest import disconnect_when, wait_until
from tests.unit.emulator.spirit.conftest import SpiritSite, Start


def test_a_take_is_one_task_as_json_or_404(site: SpiritSite) -> None:
    assert site.agent.get("/request").status_code == 404
    ids = [site.submit(), site.submit()]
    response = site.agent.get("/request")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert "x-agent-health" not in response.headers
    task = response.json()
    assert task.keys() == {"headers", "body"}
    assert all(isinstance(value, str) for value in task["headers"].values())
    assert [task["headers"]["Ease-Request-Id"], site.taken()["id"]] == ids


def test_a_take_is_held_as_long_as_the_settings_say(start: Start) -> None:
    site = start(longPoll=20)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(site.agent.get, "/request")
        wait_until(lambda: site.endpoint.long_poll._waiters)
        task_id = site.submit()
        assert held.result(10).json()["headers"]["Ease-Request-Id"] == task_id


def test_a_task_is_not_given_to_a_worker_that_has_gone(start: Start) -> None:
    site = start(longPoll=20)
    disconnect_when(lambda: site.endpoint.long_poll._waiters, site.agent, "GET", "/request")
    wait_until(lambda: not site.endpoint.long_poll._waiters)
    task_id = site.submit()
    assert site.taken()["id"] == task_id


def test_the_port_says_which_worker_it_is(start: Start) -> None:
    site = start(agentPorts=[0, 0])
    first, second = site.submit(), site.submit()
    site.taken()
    httpx.get(f"{site.agents[1]}/apis/v1/request", trust_env=False).raise_for_status()
    jobs = {job["id"]: job["workerId"] for job in site.root.get("/state").json()["endpoints"][0]["jobs"]}
    assert jobs == {first: "external-1", second: "external-2"}


def test_an_agent_has_no_routes_of_the_gateway_and_the_gateway_none_of_an_agent(site: SpiritSite) -> None:
    assert httpx.get(f"{site.agents[0]}/state", trust_env=False).status_code == 404
    assert site.root.get("/apis/v1/request").status_code == 404


def test_an_acknowledged_task_is_deleted(site: SpiritSite) -> None:
    task_id = site.submit()
    site.taken()
    assert site.endpoint.queue.in_progress == 1
    assert (site.ack(task_id).status_code, site.endpoint.queue.in_progress) == (200, 0)
    assert site.ack(task_id).status_code == 200


def test_heartbeats_keep_a_lease_and_without_them_the_task_is_redelivered(start: Start) -> None:
    site = start(lostAfter=1.5, heartbeatInterval=1)
    kept, lost = site.submit(), site.submit()
    assert [site.taken()["id"], site.taken()["id"]] == [kept, lost]

    def is_redelivered() -> bool:
        site.agent.post("/heartbeat", json={"requestIDs": [kept]}).raise_for_status()
        task = site.take()
        return task is not None and bool(task["id"] == lost)

    wait_until(is_redelivered)
    assert [worker["jobs"] for worker in site.root.get("/state").json()["endpoints"][0]["workers"]] == [[kept, lost]]


def test_a_dead_workers_task_is_lost_if_the_settings_say_so(start: Start) -> None:
    site = start(lostAfter=1.2, heartbeatInterval=1, maxRetries=0)
    task_id = site.submit()
    site.taken()
    wait_until(lambda: site.endpoint.queue.in_progress == 0)
    status = site.native.get("/status", params={"requestID": task_id}).json()
    assert (status["statusCode"], status["message"], site.take()) == (500, "lost with its worker", None)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/request-metric/x", b"{}"),
        ("/request-metric/x", b'{"status": "finished"}'),
        ("/request-result/x", b'{"statusCode": 200, "data": "not base64"}'),
        ("/request-result/x", b"not json"),
        ("/heartbeat", b'{"requestIDs": "x"}'),
    ],
)
def test_a_call_that_no_sdk_makes_is_refused(site: SpiritSite, path: str, body: bytes) -> None:
    response = site.agent.post(path, content=body)
    assert response.status_code == 400
    assert "error" in response.json()


def test_any_content_type_will_do(site: SpiritSite) -> None:
    """The SDK sends all but heartbeats as octet-stream."""
    task_id = site.submit()
    site.taken()
    body = json.dumps({"status": "succeed", "message": "succeed", "timestamp": 1})
    headers = {"Content-Type": "application/octet-stream"}
    assert site.agent.post(f"/request-metric/{task_id}", content=body, headers=headers).status_code == 200
    assert site.native.get("/status", params={"requestID": task_id}).json()["status"] == "succeed"


# Faults.


@pytest.mark.parametrize(
    ("route", "method", "path"),
    [
        ("request", "GET", "/request"),
        ("request-ack", "POST", "/request-ack/x"),
        ("request-metric", "POST", "/request-metric/x"),
        ("request-result", "POST", "/request-result/x"),
        ("request-proxy", "POST", "/request-proxy/x"),
        ("heartbeat", "POST", "/heartbeat"),
        ("agent", "POST", "/heartbeat"),
    ],
)
def test_each_call_can_fail(site: SpiritSite, route: str, method: str, path: str) -> None:
    site.put_faults({"kind": "error", "route": route, "status": 500})
    assert site.agent.request(method, path, content=b"").status_code == 500
    assert site.native.get("/status").status_code == 200
    assert site.root.get("/faults").json()["struck"] == [1]


def test_an_agent_that_is_away_drops_connections(site: SpiritSite) -> None:
    site.put_faults({"kind": "drop", "route": "agent", "times": 1})
    with pytest.raises(httpx.RemoteProtocolError):
        site.agent.get("/request")
    assert site.agent.get("/request").status_code == 404


def test_a_heartbeat_can_hang(site: SpiritSite) -> None:
    site.put_faults({"kind": "latency", "route": "heartbeat", "latency_ms": 3_600_000})
    with pytest.raises(httpx.ReadTimeout):
        site.agent.post("/heartbeat", json={"requestIDs": []}, timeout=0.2)


@pytest.mark.parametrize(("when", "with_task"), [("before", False), ("after", True)])
def test_an_agent_can_be_unhealthy_with_and_without_a_task(site: SpiritSite, when: str, with_task: bool) -> None:
    site.put_faults({"kind": "unhealthy", "route": "request", "when": when, "times": 1})
    task_id = site.submit()
    response = site.agent.get("/request")
    assert (response.headers["x-agent-health"], response.status_code == 200) == ("false", with_task)
    assert site.endpoint.queue.in_queue == (0 if with_task else 1)
    if not with_task:
        healthy = site.agent.get("/request")
        assert "x-agent-health" not in healthy.headers
        assert healthy.json()["headers"]["Ease-Request-Id"] == task_id


def test_a_task_can_be_altered(site: SpiritSite) -> None:
    headers = {"Ease-Enqueue-At": "0", "Ease-Time-To-Live": "", "Ease-Mode": None}
    site.put_faults({"kind": "alter", "route": "request", "headers": headers, "body": "bm90IGpzb24=", "times": 1})
    site.submit()
    task = site.agent.get("/request").json()
    assert (task["headers"]["Ease-Enqueue-At"], task["headers"]["Ease-Time-To-Live"]) == ("0", "")
    assert "Ease-Mode" not in task["headers"]
    assert task["body"] == "bm90IGpzb24="


def test_a_task_can_be_given_out_twice(start: Start) -> None:
    site = start(agentPorts=[0, 0])
    site.put_faults({"kind": "duplicate", "route": "request", "times": 1})
    task_id = site.submit()
    assert site.taken()["id"] == task_id
    duplicate = httpx.get(f"{site.agents[1]}/apis/v1/request", trust_env=False).json()
    assert duplicate["headers"]["Ease-Request-Id"] == task_id
    assert site.take() is None


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "error", "route": "job-take"},
        {"kind": "unhealthy", "route": "heartbeat"},
        {"kind": "alter", "route": "request"},
        {"kind": "error", "route": "request", "body": "x"},
        {"kind": "kill", "route": "sync"},
    ],
)
def test_a_fault_that_cannot_strike_is_refused(site: SpiritSite, rule: dict[str, str]) -> None:
    response = site.put_faults(rule)
    assert (response.status_code, "error" in response.json()) == (400, True)


def test_each_operation_of_the_gateway_can_fail(site: SpiritSite) -> None:
    rules = [{"kind": "error", "route": route, "status": 502} for route in ("sync", "async", "status", "proxy")]
    site.put_faults(*rules)
    answers = [
        site.native.post("/sync", json={}),
        site.native.post("/async", json={}),
        site.native.get("/status"),
        site.proxied.get("/v1/models"),
        site.proxied.get("/api/tags"),
    ]
    assert [answer.status_code for answer in answers] == [502] * 5
