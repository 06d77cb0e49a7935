"""Bodies and statuses of the client API, field by field, over real HTTP.

The expected values are those of docs.runpod.io, "Operation reference" and "Send API requests".
"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from emulator.core.job import MAX_RUN_BODY_BYTES, MAX_RUNSYNC_BODY_BYTES
from tests.unit.emulator.conftest import KEY, Site, Start


def test_run_returns_id_and_status(site: Site) -> None:
    response = site.client.post("/run", json={"input": {"prompt": "Hello, world!"}})
    assert response.status_code == 200
    body = response.json()
    assert body == {"id": body["id"], "status": "IN_QUEUE"}


def test_status_of_a_completed_job_has_the_documented_fields(site: Site) -> None:
    job_id = site.submit()
    assert site.take() == {"id": job_id, "input": "hello"}
    site.done(job_id, output={"text": ["Hello!"]}).raise_for_status()
    body = site.status(job_id)
    assert body == {
        "delayTime": body["delayTime"],
        "executionTime": body["executionTime"],
        "id": job_id,
        "output": {"text": ["Hello!"]},
        "status": "COMPLETED",
        "workerId": "w1",
    }
    assert isinstance(body["delayTime"], int)
    assert isinstance(body["executionTime"], int)


def test_runsync_responds_when_the_job_has_ended(site: Site) -> None:
    def work() -> None:
        job = None
        while job is None:
            job = site.take()
        site.done(job["id"], output=[{"image": "https://image.url", "seed": 46578}]).raise_for_status()

    worker = threading.Thread(target=work)
    worker.start()
    response = site.client.post("/runsync", json={"input": {"prompt": "Hello, world!"}})
    worker.join()
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("sync-")
    assert body == {
        "delayTime": body["delayTime"],
        "executionTime": body["executionTime"],
        "id": body["id"],
        "output": [{"image": "https://image.url", "seed": 46578}],
        "status": "COMPLETED",
        "workerId": "w1",
    }


def test_runsync_returns_the_status_after_its_wait(site: Site) -> None:
    before = time.monotonic()
    body = site.client.post("/runsync?wait=1000", json={"input": "x"}).json()
    assert 0.9 <= time.monotonic() - before < 5
    assert body == {"id": body["id"], "status": "IN_QUEUE"}
    # The job stays in the queue.
    assert site.take()["id"] == body["id"]


def test_stream_returns_each_output_once_and_then_the_final_status(site: Site) -> None:
    job_id = site.submit()
    site.take()
    site.stream(job_id, {"text": " How"}).raise_for_status()
    site.stream(job_id, {"text": " are"}).raise_for_status()
    assert site.client.get(f"/stream/{job_id}").json() == {
        "status": "IN_PROGRESS",
        "stream": [{"output": {"text": " How"}}, {"output": {"text": " are"}}],
    }
    site.stream(job_id, {"text": " you"}).raise_for_status()
    site.done(job_id, output=[]).raise_for_status()
    assert site.client.get(f"/stream/{job_id}").json() == {
        "status": "COMPLETED",
        "stream": [{"output": {"text": " you"}}],
    }
    assert site.client.get(f"/stream/{job_id}").json() == {"status": "COMPLETED", "stream": []}


def test_cancel_returns_id_and_status(site: Site) -> None:
    job_id = site.submit()
    response = site.client.post(f"/cancel/{job_id}")
    assert (response.status_code, response.json()) == (200, {"id": job_id, "status": "CANCELLED"})


def test_retry_queues_the_job_again_under_the_same_id(site: Site) -> None:
    job_id = site.submit()
    site.take()
    site.done(job_id, error="it broke").raise_for_status()
    assert site.status(job_id)["error"] == "it broke"
    response = site.client.post(f"/retry/{job_id}")
    assert (response.status_code, response.json()) == (200, {"id": job_id, "status": "IN_QUEUE"})
    assert site.status(job_id) == {"id": job_id, "status": "IN_QUEUE"}


def test_retry_of_a_job_that_has_not_failed_is_a_bad_request(site: Site) -> None:
    assert site.client.post(f"/retry/{site.submit()}").status_code == 400


def test_purge_queue_returns_the_number_of_cancelled_jobs(site: Site) -> None:
    for _ in range(2):
        site.submit()
    response = site.client.post("/purge-queue")
    assert (response.status_code, response.json()) == (200, {"removed": 2, "status": "completed"})


def test_health_has_the_documented_counts(site: Site) -> None:
    done, failed, timed, _waiting = (site.submit() for _ in range(4))
    for _ in range(3):
        site.take()
    site.done(done, output=1)
    site.done(failed, error="it broke")
    assert site.client.get("/health").json() == {
        "jobs": {"completed": 1, "failed": 1, "inProgress": 1, "inQueue": 1, "retried": 0},
        "workers": {"idle": 0, "initializing": 0, "ready": 0, "running": 1, "throttled": 0, "unhealthy": 0},
    }
    site.done(timed, output=1)
    assert site.client.get("/health").json()["workers"]["idle"] == 1


OPERATIONS = [
    ("POST", "/run"),
    ("POST", "/runsync"),
    ("GET", "/status/x"),
    ("GET", "/stream/x"),
    ("POST", "/cancel/x"),
    ("POST", "/retry/x"),
    ("POST", "/purge-queue"),
    ("GET", "/health"),
]


@pytest.mark.parametrize("header", [None, "Bearer wrong", "wrong", "Bearer", f"Basic {KEY}"])
def test_without_a_valid_key_every_operation_is_unauthorized(site: Site, header: str | None) -> None:
    for method, path in OPERATIONS:
        request = site.client.build_request(method, path, json={"input": "x"})
        del request.headers["authorization"]
        if header is not None:
            request.headers["authorization"] = header
        assert site.client.send(request).status_code == 401, path


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", KEY])
def test_a_key_is_accepted_with_and_without_bearer(site: Site, header: str) -> None:
    assert site.client.get("/health", headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/status/x"), ("GET", "/stream/x"), ("POST", "/cancel/x")])
def test_an_unknown_job_is_not_found(site: Site, method: str, path: str) -> None:
    assert site.client.request(method, path).status_code == 404


def test_an_unknown_endpoint_is_not_found(site: Site) -> None:
    assert site.root.post("/v2/other/run", json={"input": 1}).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[]",
        b"{}",
        b'{"input": null}',
        b'{"input": NaN}',
        b'{"input": [-Infinity]}',
        b'{"input": 1, "policy": {"ttl": 9999}}',
        b'{"input": 1, "policy": {"executionTimeout": 4999}}',
        b'{"input": 1, "webhook": "not a url"}',
    ],
)
def test_an_invalid_submission_is_a_bad_request(site: Site, body: bytes) -> None:
    response = site.client.post("/run", content=body)
    assert response.status_code == 400
    assert response.json()["error"]


@pytest.mark.parametrize(
    ("path", "limit"), [("/run", MAX_RUN_BODY_BYTES), ("/runsync?wait=1000", MAX_RUNSYNC_BODY_BYTES)]
)
def test_a_body_above_the_documented_limit_is_too_large(site: Site, path: str, limit: int) -> None:
    frame = len('{"input": ""}')
    fits = b'{"input": "' + b"x" * (limit - frame) + b'"}'
    assert site.client.post(path, content=fits).status_code == 200
    assert site.client.post(path, content=fits + b" ").status_code == 413


def test_a_body_of_unknown_length_above_the_limit_is_too_large(site: Site) -> None:
    chunks = (b" " * 1_000_000 for _ in range(11))
    assert site.client.post("/run", content=chunks).status_code == 413


@pytest.mark.parametrize("wait", ["soon", "-1", pytest.param("9" * 5000, id="huge")])
def test_a_wait_that_is_not_a_number_is_a_bad_request(site: Site, wait: str) -> None:
    assert site.client.post(f"/runsync?wait={wait}", json={"input": 1}).status_code == 400


def test_ttl_on_status_makes_a_result_expire_early(site: Site) -> None:
    job_id = site.submit()
    site.take()
    site.done(job_id, output=1)
    assert site.client.get(f"/status/{job_id}?ttl=1").status_code == 200
    deadline = time.monotonic() + 5
    while site.client.get(f"/status/{job_id}").status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert site.client.get(f"/status/{job_id}").status_code == 404


def test_a_third_purge_within_ten_seconds_is_rate_limited(site: Site) -> None:
    assert [site.client.post("/purge-queue").status_code for _ in range(3)] == [200, 200, 429]


def test_rate_limits_can_be_disabled(start: Start) -> None:
    site = start(rateLimits=False)
    assert [site.client.post("/purge-queue").status_code for _ in range(3)] == [200, 200, 200]


def test_endpoints_have_separate_jobs(start: Start) -> None:
    site = start(({"id": "other"},))
    job_id = site.submit()
    assert site.root.get(f"/v2/other/status/{job_id}").status_code == 404
    assert site.root.get("/v2/other/health").json()["jobs"]["inQueue"] == 0
    assert site.status(job_id)["status"] == "IN_QUEUE"


def test_s3_config_is_sent_to_the_worker_but_not_returned_to_clients(site: Site) -> None:
    config: dict[str, Any] = {"accessId": "id", "accessSecret": "secret", "bucketName": "b", "endpointUrl": "https://x"}
    job_id = site.submit("x", s3Config=config)
    assert site.take() == {"id": job_id, "input": "x", "s3Config": config}
    assert "s3Config" not in site.status(job_id)
