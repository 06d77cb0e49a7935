"""The OpenAI gateway over real HTTP; the test acts as the worker."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from emulator.api.openai_gateway import _EventStream, failure_of
from emulator.core.job import Job, JobStatus
from tests.unit.emulator.conftest import KEY, Site, Start, disconnect_when, wait_until
from tests.unit.emulator.fakes import submission

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
ERROR = {"error": {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}}
FAILURE = json.dumps({**ERROR, "status": 404, "retryable": False})


def with_worker(site: Site, work: Callable[[dict[str, Any]], object], request: Callable[[], httpx.Response]) -> Any:
    """Return the response to a request while `work` handles its job."""

    def take() -> None:
        deadline = time.monotonic() + 30
        while (job := site.take()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError("no job came")
        work(job)

    worker = threading.Thread(target=take)
    worker.start()
    response = request()
    worker.join()
    return response


def test_a_post_becomes_a_job_with_route_and_body(site: Site) -> None:
    jobs: list[dict[str, Any]] = []

    def work(job: dict[str, Any]) -> None:
        jobs.append(job)
        site.done(job["id"], output=[{"id": "chatcmpl-1"}])

    response = with_worker(site, work, lambda: site.client.post("/openai/v1/chat/completions", json=CHAT))
    assert (response.status_code, response.json()) == (200, {"id": "chatcmpl-1"})
    assert jobs[0]["input"] == {"openai_route": "/v1/chat/completions", "openai_input": CHAT}


def test_a_get_becomes_a_job_without_a_body(site: Site) -> None:
    jobs: list[dict[str, Any]] = []

    def work(job: dict[str, Any]) -> None:
        jobs.append(job)
        site.done(job["id"], output=[{"data": []}])

    response = with_worker(site, work, lambda: site.client.get("/openai/v1/models?limit=2"))
    assert (response.status_code, response.json()) == (200, {"data": []})
    assert jobs[0]["input"] == {"openai_route": "/v1/models?limit=2"}


@pytest.mark.parametrize(
    ("streamed", "output", "expected"),
    [
        ([], {"id": 1}, {"id": 1}),
        ([], '{"id": 1}', {"id": 1}),
        ([{"id": 1}], [], {"id": 1}),
        (['{"id": 1}'], ['{"id": 1}'], {"id": 1}),
        (['{"i', 'd": 1}'], [], {"id": 1}),
        ([], ["plain"], "plain"),
        ([], 0, 0),
        ([], None, None),
        ([], [], []),
    ],
)
def test_the_response_body_is_the_jobs_single_value(
    site: Site, streamed: list[Any], output: Any, expected: object
) -> None:
    def work(job: dict[str, Any]) -> None:
        for value in streamed:
            site.stream(job["id"], value)
        site.done(job["id"], output=output)

    assert with_worker(site, work, lambda: site.client.post("/openai/v1/completions", json=CHAT)).json() == expected


@pytest.mark.parametrize("stream", [True, "true", 1])
def test_events_are_forwarded_as_they_arrive(site: Site, stream: object) -> None:
    body = {**CHAT, "stream": stream}
    seen = threading.Event()

    def work(job: dict[str, Any]) -> None:
        site.stream(job["id"], 'data: {"n": 1}\n\ndata: {"n": 2}\n\n')
        # The second output is posted only after the first has reached the client.
        seen.wait(10)
        site.stream(job["id"], "data: 漢字\n\n")
        site.stream(job["id"], "data: [DONE]\n\n")
        site.done(job["id"], output=[])

    def request() -> httpx.Response:
        with site.client.stream("POST", "/openai/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert [next(lines) for _ in range(3)] == ['data: {"n": 1}', "", 'data: {"n": 2}']
            seen.set()
            assert list(lines) == ["", "data: 漢字", "", "data: [DONE]", ""]
        return response

    response = with_worker(site, work, request)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_jobs_error_sets_status_and_body(site: Site, stream: bool) -> None:
    response = with_worker(
        site,
        lambda job: site.done(job["id"], error=FAILURE),
        lambda: site.client.post("/openai/v1/chat/completions", json={**CHAT, "stream": stream}),
    )
    assert (response.status_code, response.json()) == (404, ERROR)


def test_a_failure_after_the_first_output_is_sent_as_the_last_event(site: Site) -> None:
    def work(job: dict[str, Any]) -> None:
        site.stream(job["id"], "data: 1\n\n")
        site.done(job["id"], error=FAILURE)

    body = {**CHAT, "stream": True}
    response = with_worker(site, work, lambda: site.client.post("/openai/v1/chat/completions", json=body))
    assert response.status_code == 200
    assert response.text == f"data: 1\n\ndata: {json.dumps(ERROR)}\n\n"


@pytest.mark.parametrize(
    "event",
    [
        {"error": ERROR["error"]},
        {"type": "error", "error": ERROR["error"]},
        {"type": "response.failed", "response": {"error": {"message": "no"}}},
    ],
)
def test_an_error_event_of_the_worker_is_not_repeated(site: Site, event: dict[str, Any]) -> None:
    error_event = f"data: {json.dumps(event)}\n\n"

    def work(job: dict[str, Any]) -> None:
        site.stream(job["id"], "data: 1\n\n")
        site.stream(job["id"], error_event)
        site.done(job["id"], error=FAILURE)

    body = {**CHAT, "stream": True}
    response = with_worker(site, work, lambda: site.client.post("/openai/v1/chat/completions", json=body))
    assert response.text == f"data: 1\n\n{error_event}"


def test_a_stream_whose_worker_is_lost_ends_with_an_error_event(site: Site) -> None:
    def work(job: dict[str, Any]) -> None:
        site.stream(job["id"], "data: 1\n\n")
        endpoint = site.endpoint
        deadline = time.monotonic() + 5
        while f"job/{job['id']}" not in endpoint.long_poll._waiters:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # Makes the queue consider the job lost, as if the worker were silent.
        endpoint.queue.settings = endpoint.queue.settings.__class__(lost_after_s=0)

    body = {**CHAT, "stream": True}
    response = with_worker(site, work, lambda: site.client.post("/openai/v1/chat/completions", json=body))
    assert response.text.startswith("data: 1\n\ndata: ")
    assert "worker was lost" in response.text
    deadline = time.monotonic() + 5
    while site.client.get("/health").json()["jobs"]["inQueue"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stream_ends_at_the_done_event_and_its_job_is_not_cancelled(site: Site) -> None:
    jobs: list[str] = []
    stream_ended = threading.Event()

    def work(job: dict[str, Any]) -> None:
        jobs.append(job["id"])
        site.stream(job["id"], "data: 1\n\ndata: [DONE]\n\n")
        assert stream_ended.wait(10)
        assert site.status(job["id"])["status"] == "IN_PROGRESS"
        site.done(job["id"], output=["data: 1\n\ndata: [DONE]\n\n"])

    def request() -> httpx.Response:
        response = site.client.post("/openai/v1/chat/completions", json={**CHAT, "stream": True})
        stream_ended.set()
        return response

    assert with_worker(site, work, request).text == "data: 1\n\ndata: [DONE]\n\n"
    assert site.status(jobs[0])["status"] == "COMPLETED"
    assert site.endpoint.limiter._running["openai"] == 0


def test_a_stream_read_after_its_jobs_retention_ends_without_an_error(site: Site) -> None:
    endpoint = site.endpoint
    job = Job("removed", submission(), 0, 0, 60, "run", status=JobStatus.COMPLETED, outputs=["data: 1\n\n"])
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(_EventStream(endpoint, job, ExitStack())({}, receive, send))
    assert sent[-1] == {"type": "http.response.body"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_disconnect_cancels_its_running_job(start: Start, stream: bool) -> None:
    site = start(longPoll=10)
    body = {**CHAT, "stream": stream}
    jobs: list[str] = []

    def work(job: dict[str, Any]) -> None:
        if stream:
            site.stream(job["id"], "data: 1\n\n")
        jobs.append(job["id"])

    def request() -> httpx.Response:
        disconnect_when(lambda: jobs, site.client, "POST", "/openai/v1/chat/completions", body)
        return httpx.Response(200)

    with_worker(site, work, request)
    assert site.worker.get("/job-stop/w1?gpu=x").json() == {"jobsToStop": jobs}
    assert site.status(jobs[0])["status"] == "CANCELLED"
    assert site.endpoint.limiter._running["openai"] == 0


def test_a_client_disconnect_cancels_its_waiting_job(site: Site) -> None:
    def waiting() -> int:
        in_queue: int = site.client.get("/health").json()["jobs"]["inQueue"]
        return in_queue

    disconnect_when(waiting, site.client, "POST", "/openai/v1/chat/completions", CHAT)
    wait_until(lambda: not waiting())


@pytest.mark.parametrize("header", [f"ep-{KEY}", f"Bearer ep-{KEY}"])
def test_v1_routes_take_the_endpoint_from_the_key(site: Site, header: str) -> None:
    response = with_worker(
        site,
        lambda job: site.done(job["id"], output=[{"id": 1}]),
        lambda: httpx.post(f"{site.url}/v1/chat/completions", json=CHAT, headers={"Authorization": header}, timeout=10),
    )
    assert (response.status_code, response.json()) == (200, {"id": 1})


@pytest.mark.parametrize("header", [KEY, "ep-wrong", f"other-{KEY}", "ep-", ""])
def test_v1_routes_without_endpoint_and_key_are_unauthorized(site: Site, header: str) -> None:
    response = httpx.post(f"{site.url}/v1/chat/completions", json=CHAT, headers={"Authorization": header})
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "AuthenticationError"


@pytest.mark.parametrize(
    ("path", "header", "content", "status"),
    [
        ("/v2/ep/openai/v1/models", "wrong", b"", 401),
        ("/v2/no/openai/v1/models", KEY, b"", 404),
        ("/v2/ep/openai/v1/completions", KEY, b"no json", 400),
        ("/v2/ep/openai/v1/completions", KEY, b"[]", 400),
    ],
)
def test_api_errors_have_the_openai_error_format(
    site: Site, path: str, header: str, content: bytes, status: int
) -> None:
    method = "POST" if content else "GET"
    response = httpx.request(method, site.url + path, content=content, headers={"Authorization": header})
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status


def ended(status: str, error: str | None) -> Job:
    return Job("id", submission(), 0, 0, 60, "run", status=JobStatus(status), error=error)


@pytest.mark.parametrize(
    ("status", "error", "expected", "message"),
    [
        ("FAILED", "plain text", 500, "plain text"),
        ("FAILED", '"a string"', 500, '"a string"'),
        ("FAILED", '{"error_type": "E", "error_message": "it broke", "error_traceback": "..."}', 500, "it broke"),
        ("FAILED", '{"error": {"message": "m", "code": 422}}', 422, "m"),
        ("FAILED", '{"error": {"message": "m", "code": "context_length"}, "status": 400}', 400, "m"),
        ("FAILED", '{"error": {"message": "m"}, "status": 200}', 500, "m"),
        ("FAILED", None, 500, ""),
        ("TIMED_OUT", "executionTimeout exceeded", 504, "the job timed out: executionTimeout exceeded"),
        ("CANCELLED", None, 499, "the job was cancelled"),
    ],
)
def test_every_failure_has_a_status_and_a_message(status: str, error: str | None, expected: int, message: str) -> None:
    failure = failure_of(ended(status, error))
    assert failure is not None
    assert (failure.status, failure.body["error"]["message"]) == (expected, message)


def test_a_completed_job_has_no_failure() -> None:
    assert failure_of(ended("COMPLETED", None)) is None


def test_other_error_formats_are_forwarded_unchanged() -> None:
    body = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
    failure = failure_of(ended("FAILED", json.dumps({**body, "status": 400, "retryable": False})))
    assert failure is not None
    assert (failure.status, failure.body) == (400, body)
