"""Faults: their sequences, and what they do to requests, over real HTTP, with the test for a worker."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from emulator.core.faults import Faults, FaultSettings
from tests.unit.emulator.conftest import Site, Start

DROPPED = (httpx.NetworkError, httpx.RemoteProtocolError)


def put(site: Site, *rules: dict[str, Any], **settings: Any) -> httpx.Response:
    return site.root.put("/faults", json={"rules": rules, **settings})


def sequence(seed: int, count: int = 200, rate: float = 0.3, route: str = "run") -> list[bool]:
    rules = {"seed": seed, "rules": [{"kind": "drop", "route": route, "rate": rate}]}
    faults = Faults(FaultSettings.model_validate(rules))
    return [bool(faults.match("ep", "run")) for _ in range(count)]


def test_the_same_seed_gives_the_same_faults() -> None:
    assert sequence(7) == sequence(7)
    assert sequence(7) != sequence(8)


def test_the_rate_is_how_often_a_fault_strikes() -> None:
    assert 0.25 < sum(sequence(1, 2000)) / 2000 < 0.35
    assert not any(sequence(1, rate=0))
    assert all(sequence(1, rate=1))


def test_requests_of_other_routes_leave_a_sequence_as_it_is() -> None:
    rules = {"seed": 7, "rules": [{"kind": "drop", "route": "run", "rate": 0.3}]}
    faults = Faults(FaultSettings.model_validate(rules))
    struck = []
    for _ in range(200):
        assert faults.match("ep", "status") == []
        struck.append(bool(faults.match("ep", "run")))
    assert struck == sequence(7)


def test_a_rule_strikes_so_many_times_and_at_its_endpoint_alone() -> None:
    rules = {"rules": [{"kind": "drop", "times": 2, "endpoint": "ep"}]}
    faults = Faults(FaultSettings.model_validate(rules))
    assert [bool(faults.match(endpoint, "run")) for endpoint in ("other", "ep", "ep", "ep")] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "explode"},
        {"kind": "drop", "rate": 1.1},
        {"kind": "error", "status": 200},
        {"kind": "latency"},
        {"kind": "duplicate", "route": "run"},
        {"kind": "kill", "route": "run"},
        {"kind": "drop", "unknown": 1},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_and_the_old_ones_stay(site: Site, rule: dict[str, Any]) -> None:
    put(site, {"kind": "error", "route": "cancel"})
    assert put(site, rule).status_code == 400
    assert site.root.get("/faults").json()["rules"][0]["route"] == "cancel"


def test_faults_are_shown_and_ended(site: Site) -> None:
    put(site, {"kind": "error", "route": "health", "status": 503, "times": 1}, seed=3).raise_for_status()
    assert site.client.get("/health").status_code == 503
    assert site.client.get("/health").status_code == 200
    assert site.root.get("/faults").json() == {
        "seed": 3,
        "rules": [
            {
                "kind": "error",
                "route": "health",
                "rate": 1.0,
                "when": "before",
                "status": 503,
                "latency_ms": 0,
                "times": 1,
                "endpoint": None,
            }
        ],
        "throttled_workers": 0,
        "struck": [1],
    }
    assert site.root.put("/faults", json={}).json()["rules"] == []


def test_faults_are_set_and_workers_killed_by_those_with_a_key_alone(site: Site) -> None:
    with httpx.Client(base_url=site.url) as stranger:
        assert stranger.put("/faults", json={"rules": [{"kind": "drop"}]}).status_code == 401
        assert stranger.get("/faults").status_code == 401
        assert stranger.post("/workers/w1/kill").status_code == 401
    assert site.root.get("/faults").json()["rules"] == []


def test_a_worker_that_is_not_ours_cannot_be_killed(site: Site) -> None:
    site.take()
    assert site.root.post("/workers/w1/kill").status_code == 404


def test_an_error_strikes_before_a_job_is_queued_or_after(site: Site) -> None:
    put(site, {"kind": "error", "route": "run", "status": 429, "times": 1})
    assert site.client.post("/run", json={"input": 1}).status_code == 429
    assert site.client.get("/health").json()["jobs"]["inQueue"] == 0
    put(site, {"kind": "error", "route": "run", "when": "after", "times": 1})
    assert site.client.post("/run", json={"input": 1}).status_code == 500
    assert site.client.get("/health").json()["jobs"]["inQueue"] == 1


@pytest.mark.parametrize(("when", "queued"), [("before", 0), ("after", 1)])
def test_a_dropped_connection_has_no_answer(site: Site, when: str, queued: int) -> None:
    put(site, {"kind": "drop", "route": "run", "when": when, "times": 1})
    with pytest.raises(DROPPED):
        site.client.post("/run", json={"input": 1})
    assert site.client.get("/health").json()["jobs"]["inQueue"] == queued


def test_a_slow_route_is_slow_and_others_are_not(site: Site) -> None:
    put(site, {"kind": "latency", "route": "status", "latency_ms": 300})
    job_id = site.submit()
    before = time.monotonic()
    site.status(job_id)
    assert time.monotonic() - before >= 0.3


def test_a_late_delivery_leaves_the_job_with_its_worker_on_the_way(site: Site) -> None:
    put(site, {"kind": "latency", "route": "job-take", "when": "after", "latency_ms": 400, "times": 1})
    job_id = site.submit()
    before = time.monotonic()
    assert site.take()["id"] == job_id
    assert time.monotonic() - before >= 0.4
    assert site.done(job_id, output=1).status_code == 200


def test_a_job_whose_delivery_is_dropped_comes_to_another_worker(start: Start) -> None:
    site = start(lostAfter=1)
    put(site, {"kind": "drop", "route": "job-take", "when": "after", "times": 1})
    job_id = site.submit()
    with pytest.raises(DROPPED):
        site.take()
    assert site.status(job_id)["status"] == "IN_PROGRESS"
    job = None
    while job is None:
        job = site.take("w2")
    assert job["id"] == job_id
    assert site.status(job_id)["retries"] == 1


@pytest.mark.parametrize("second", ["w1", "w2"])
def test_a_duplicate_is_given_out_twice_and_held_once(site: Site, second: str) -> None:
    put(site, {"kind": "duplicate", "route": "job-take", "times": 1})
    job_id = site.submit("x")
    first_copy, second_copy = site.take("w1"), site.take(second)
    assert first_copy == second_copy == {"id": job_id, "input": "x"}
    if second == "w2":
        assert site.done(job_id, worker="w2", output="second").status_code == 400
    assert site.done(job_id, worker="w1", output="first").status_code == 200
    assert site.done(job_id, worker="w1", output="again").status_code == 400
    assert site.status(job_id)["output"] == "first"
    assert site.take("w1") is None


def test_batches_are_takes(site: Site) -> None:
    put(site, {"kind": "error", "route": "job-take", "status": 429})
    assert site.worker.get("/job-take-batch/w1?batch_size=2").status_code == 429


def test_the_gateways_plain_form_is_a_request_of_its_route(site: Site) -> None:
    put(site, {"kind": "error", "route": "openai", "status": 503})
    assert httpx.get(f"{site.url}/v1/models", headers={"Authorization": "x"}).status_code == 503
    assert site.client.get("/openai/v1/models").status_code == 503
