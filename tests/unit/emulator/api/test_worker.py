"""The worker API as the SDK uses it, over real HTTP; the test acts as the worker."""

from __future__ import annotations

import json
import threading
import time

import httpx
import pytest

from emulator.core.job import MAX_CHUNK_BYTES, MAX_RESULT_BYTES
from tests.unit.emulator.conftest import KEY, Site, Start, disconnect_when, wait_until


def test_a_poll_without_a_job_returns_204_after_the_long_poll_timeout(site: Site) -> None:
    before = time.monotonic()
    response = site.worker.get("/job-take/w1?gpu=x&job_in_progress=0")
    assert response.status_code == 204
    assert response.content == b""
    assert time.monotonic() - before >= 0.3


def test_a_job_ends_a_waiting_poll(start: Start) -> None:
    site = start(longPoll=20)
    taken: list[object] = []
    poll = threading.Thread(target=lambda: taken.append(site.take()))
    poll.start()
    job_id = site.submit({"prompt": "hi"})
    poll.join(5)
    assert taken == [{"id": job_id, "input": {"prompt": "hi"}}]


def test_a_batch_has_at_most_batch_size_jobs(site: Site) -> None:
    ids = [site.submit(number) for number in range(3)]
    first = site.worker.get("/job-take-batch/w1?gpu=x&batch_size=2&job_in_progress=0")
    assert first.json() == [{"id": ids[0], "input": 0}, {"id": ids[1], "input": 1}]
    assert first.headers["content-type"] == "application/json"
    second = site.worker.get("/job-take-batch/w1?gpu=x&batch_size=2&job_in_progress=1")
    assert second.json() == [{"id": ids[2], "input": 2}]
    assert site.worker.get("/job-take-batch/w1?gpu=x&batch_size=2").status_code == 204


@pytest.mark.parametrize("size", ["0", "-1", "many", "", pytest.param("9" * 5000, id="huge")])
def test_an_invalid_batch_size_is_a_bad_request(site: Site, size: str) -> None:
    assert site.worker.get(f"/job-take-batch/w1?batch_size={size}").status_code == 400


def test_a_disconnected_worker_gets_no_job(start: Start) -> None:
    site = start(longPoll=20)
    polls = site.endpoint.long_poll._waiters
    disconnect_when(lambda: polls, site.worker, "GET", "/job-take/w1?gpu=x")
    wait_until(lambda: not polls)  # The server notices the disconnect a moment later.
    job_id = site.submit()
    assert site.status(job_id)["status"] == "IN_QUEUE"
    assert site.take("w2")["id"] == job_id


def test_json_with_a_forms_content_type_is_accepted_as_the_sdk_sends_it(site: Site) -> None:
    job_id = site.submit()
    site.take()
    response = site.worker.post(
        f"/job-done/w1/{job_id}?gpu=x&isStream=true",
        content=json.dumps({"output": "漢字"}, ensure_ascii=False).encode(),
        headers={"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded", "X-Request-ID": job_id},
    )
    assert response.status_code == 200
    assert site.status(job_id)["output"] == "漢字"


def test_a_progress_update_keeps_the_job_in_progress(site: Site) -> None:
    job_id = site.submit()
    site.take()
    assert site.done(job_id, status="IN_PROGRESS", output="half").status_code == 200
    assert (site.status(job_id)["status"], site.status(job_id)["output"]) == ("IN_PROGRESS", "half")


def test_an_error_fails_the_job_and_is_kept_as_text(site: Site) -> None:
    job_id = site.submit()
    site.take()
    assert site.done(job_id, error='{"error": {"message": "no"}}').status_code == 200
    assert (site.status(job_id)["status"], site.status(job_id)["error"]) == ("FAILED", '{"error": {"message": "no"}}')


def test_an_error_that_is_no_text_is_kept_as_json(site: Site) -> None:
    job_id = site.submit()
    site.take()
    site.done(job_id, error={"error": {"message": "no", "param": None}}).raise_for_status()
    assert site.status(job_id)["error"] == '{"error": {"message": "no", "param": null}}'


def test_updates_from_a_worker_without_the_job_are_rejected(site: Site) -> None:
    job_id = site.submit()
    site.take("w1")
    assert site.stream(job_id, "x", worker="w2").status_code == 400
    assert site.done(job_id, worker="w2", output="x").status_code == 400
    assert site.done("no-such-job", output="x").status_code == 400
    assert site.status(job_id)["status"] == "IN_PROGRESS"


def test_updates_of_a_cancelled_job_are_rejected(site: Site) -> None:
    job_id = site.submit()
    site.take()
    site.client.post(f"/cancel/{job_id}")
    assert site.stream(job_id, "x").status_code == 400
    assert site.done(job_id, output="x").status_code == 400
    assert site.status(job_id)["status"] == "CANCELLED"


@pytest.mark.parametrize(("route", "limit"), [("job-stream", MAX_CHUNK_BYTES), ("job-done", MAX_RESULT_BYTES)])
def test_an_update_above_the_size_limit_is_rejected(site: Site, route: str, limit: int) -> None:
    job_id = site.submit()
    site.take()
    frame = len('{"output": ""}')
    fits = b'{"output": "' + b"x" * (limit - frame) + b'"}'
    assert site.worker.post(f"/{route}/w1/{job_id}?gpu=x", content=fits + b" ").status_code == 400
    assert site.status(job_id)["status"] == "IN_PROGRESS"
    assert site.worker.post(f"/{route}/w1/{job_id}?gpu=x", content=fits).status_code == 200


@pytest.mark.parametrize("body", [b"", b"output=1", b"[]"])
def test_an_update_that_is_not_a_json_object_is_rejected(site: Site, body: bytes) -> None:
    job_id = site.submit()
    site.take()
    assert site.worker.post(f"/job-done/w1/{job_id}?gpu=x", content=body).status_code == 400
    assert site.status(job_id)["status"] == "IN_PROGRESS"


def test_the_stop_poll_returns_each_job_to_stop_once(start: Start) -> None:
    site = start(longPoll=0.3)
    first, second = site.submit(), site.submit()
    site.take()
    site.take()
    assert site.worker.get("/job-stop/w1?gpu=x").status_code == 204
    site.client.post(f"/cancel/{first}")
    site.client.post(f"/cancel/{second}")
    response = site.worker.get("/job-stop/w1?gpu=x")
    assert (response.status_code, response.json()) == (200, {"jobsToStop": [first, second]})
    assert site.worker.get("/job-stop/w1?gpu=x").status_code == 204


def test_a_stop_signal_ends_a_waiting_stop_poll(start: Start) -> None:
    site = start(longPoll=20)
    job_id = site.submit()
    site.take()
    stopped: list[object] = []
    poll = threading.Thread(target=lambda: stopped.append(site.worker.get("/job-stop/w1?gpu=x").json()))
    poll.start()
    site.client.post(f"/cancel/{job_id}")
    poll.join(5)
    assert stopped == [{"jobsToStop": [job_id]}]


def test_a_job_missing_from_the_pings_is_queued_again(start: Start) -> None:
    site = start(lostAfter=1.5)
    kept, dropped = site.submit(), site.submit()
    site.take()
    site.take()
    deadline = time.monotonic() + 60
    while site.status(dropped)["status"] == "IN_PROGRESS":
        assert site.worker.get(f"/ping/w1?job_id={kept}&runpod_version=1.12.0").status_code == 200
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert site.status(dropped) == {"id": dropped, "status": "IN_QUEUE", "retries": 1}
    assert site.status(kept)["status"] == "IN_PROGRESS"


def test_a_worker_that_stops_pinging_loses_its_jobs(start: Start) -> None:
    site = start(lostAfter=1)
    job_id = site.submit()
    site.take()
    deadline = time.monotonic() + 5
    while site.status(job_id)["status"] == "IN_PROGRESS":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert site.take("w2")["id"] == job_id
    assert site.done(job_id, worker="w1", output="late").status_code == 400
    assert site.done(job_id, worker="w2", output="done").status_code == 200
    assert site.client.get("/health").json()["jobs"]["retried"] == 1


@pytest.mark.parametrize("header", [None, "wrong", "Bearer wrong"])
def test_an_external_worker_without_a_valid_key_is_unauthorized(site: Site, header: str | None) -> None:
    job_id = site.submit()
    for path in ("/job-take/w1", "/job-stop/w1", "/ping/w1"):
        request = httpx.Request("GET", f"{site.url}/v2/ep{path}", headers={"Authorization": header} if header else {})
        with httpx.Client() as client:
            assert client.send(request).status_code == 401
    assert site.status(job_id)["status"] == "IN_QUEUE"


def test_an_external_worker_may_use_an_api_key(site: Site) -> None:
    job_id = site.submit()
    taken = site.worker.get("/job-take/w1?gpu=x", headers={"Authorization": KEY})
    assert taken.json()["id"] == job_id


def test_a_worker_removed_for_silence_can_return(start: Start) -> None:
    site = start(lostAfter=0.5)
    assert site.take("w1") is None
    deadline = time.monotonic() + 5
    while site.client.get("/health").json()["workers"]["idle"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job_id = site.submit()
    assert site.take("w1")["id"] == job_id


def test_a_lone_surrogate_reaches_the_worker_unchanged(site: Site) -> None:
    response = site.client.post("/run", content=b'{"input": {"prompt": "half \\ud83d"}}')

    assert site.take() == {"id": response.json()["id"], "input": {"prompt": "half \ud83d"}}
