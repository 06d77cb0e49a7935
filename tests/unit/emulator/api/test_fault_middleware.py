"""Injected faults over real HTTP; the test acts as the worker."""

from __future__ import annotations

import time

import httpx
import pytest

from tests.unit.emulator.conftest import Site, Start

DROPPED = (httpx.NetworkError, httpx.RemoteProtocolError)


def test_an_error_is_injected_before_or_after_the_job_is_queued(site: Site) -> None:
    site.put_faults({"kind": "error", "route": "run", "status": 429, "times": 1})
    assert site.client.post("/run", json={"input": 1}).status_code == 429
    assert site.client.get("/health").json()["jobs"]["inQueue"] == 0
    site.put_faults({"kind": "error", "route": "run", "when": "after", "times": 1})
    assert site.client.post("/run", json={"input": 1}).status_code == 500
    assert site.client.get("/health").json()["jobs"]["inQueue"] == 1


@pytest.mark.parametrize(("when", "queued"), [("before", 0), ("after", 1)])
def test_a_dropped_connection_has_no_response(site: Site, when: str, queued: int) -> None:
    site.put_faults({"kind": "drop", "route": "run", "when": when, "times": 1})
    with pytest.raises(DROPPED):
        site.client.post("/run", json={"input": 1})
    assert site.client.get("/health").json()["jobs"]["inQueue"] == queued


def test_a_kill_of_an_external_worker_drops_its_connection(site: Site) -> None:
    site.put_faults({"kind": "kill", "route": "job-take", "times": 1})

    with pytest.raises(DROPPED):
        site.take()
    job_id = site.submit()
    assert site.take()["id"] == job_id


def test_a_worker_route_without_a_worker_is_not_found_and_gets_no_fault(site: Site) -> None:
    site.put_faults({"kind": "kill", "route": "ping"})
    assert site.worker.get("/ping").status_code == 404
    assert site.root.get("/faults").json()["struck"] == [0]


def test_latency_is_added_to_its_route_only(site: Site) -> None:
    site.put_faults({"kind": "latency", "route": "status", "latency_ms": 300})
    job_id = site.submit()
    before = time.monotonic()
    site.status(job_id)
    assert time.monotonic() - before >= 0.3


def test_a_delayed_take_response_keeps_the_job_with_its_worker(site: Site) -> None:
    site.put_faults({"kind": "latency", "route": "job-take", "when": "after", "latency_ms": 400, "times": 1})
    job_id = site.submit()
    before = time.monotonic()
    assert site.take()["id"] == job_id
    assert time.monotonic() - before >= 0.4
    assert site.done(job_id, output=1).status_code == 200


def test_a_job_whose_take_response_is_dropped_is_taken_by_another_worker(start: Start) -> None:
    site = start(lostAfter=1)
    site.put_faults({"kind": "drop", "route": "job-take", "when": "after", "times": 1})
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
def test_a_duplicated_job_is_taken_twice_but_assigned_once(site: Site, second: str) -> None:
    site.put_faults({"kind": "duplicate", "route": "job-take", "times": 1})
    job_id = site.submit("x")
    first_copy, second_copy = site.take("w1"), site.take(second)
    assert first_copy == second_copy == {"id": job_id, "input": "x"}
    if second == "w2":
        assert site.done(job_id, worker="w2", output="second").status_code == 400
    assert site.done(job_id, worker="w1", output="first").status_code == 200
    assert site.done(job_id, worker="w1", output="again").status_code == 400
    assert site.status(job_id)["output"] == "first"
    assert site.take("w1") is None


def test_take_faults_apply_to_batch_takes(site: Site) -> None:
    site.put_faults({"kind": "error", "route": "job-take", "status": 429})
    assert site.worker.get("/job-take-batch/w1?batch_size=2").status_code == 429


def test_openai_faults_apply_to_both_gateway_routes(site: Site) -> None:
    site.put_faults({"kind": "error", "route": "openai", "status": 503})
    assert httpx.get(f"{site.url}/v1/models", headers={"Authorization": "x"}).status_code == 503
    assert site.client.get("/openai/v1/models").status_code == 503
