"""The state that the page shows."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx

from tests.unit.emulator.conftest import KEY, NO_CERTIFICATES, Site, Start, emulator_with


def test_the_state_has_workers_and_jobs_without_inputs_outputs_or_keys(site: Site) -> None:
    job_id = site.submit({"prompt": "a private prompt"})
    site.take()
    site.stream(job_id, "a private output")
    response = site.root.get("/state")
    assert "private" not in response.text
    assert KEY not in response.text
    assert site.endpoint.worker_key not in response.text
    (endpoint,) = response.json()["endpoints"]
    assert endpoint.keys() == {
        "id",
        "openaiPath",
        "authorization",
        "cancelPath",
        "scaler",
        "health",
        "history",
        "workers",
        "gone",
        "jobs",
        "events",
    }
    assert endpoint["openaiPath"] == "/v2/ep/openai/v1"
    (job,) = endpoint["jobs"]
    assert job == {
        "id": job_id,
        "kind": "run",
        "status": "IN_PROGRESS",
        "workerId": "w1",
        "submittedAt": job["submittedAt"],
        "takenAt": job["takenAt"],
        "firstOutputAt": job["firstOutputAt"],
        "endedAt": None,
        "delayTime": job["delayTime"],
        "executionTime": None,
        "outputs": 1,
        "retries": 0,
        "lowPriority": False,
    }
    assert abs(job["submittedAt"] - time.time()) < 60
    assert job["submittedAt"] <= job["takenAt"] <= job["firstOutputAt"]
    (worker,) = endpoint["workers"]
    assert worker == {
        "id": "w1",
        "state": "running",
        "reason": "started externally",
        "pid": None,
        "startedAt": worker["startedAt"],
        "readyAt": worker["readyAt"],
        "since": worker["since"],
        "endedAt": None,
        "exitCode": None,
        "jobsTaken": 1,
        "jobs": [job_id],
        "log": [],
    }
    assert endpoint["events"][-1]["text"] == "worker w1 registered: started externally"


def test_the_state_has_at_most_200_jobs_newest_first(start: Start) -> None:
    site = start(workersMax=2)
    jobs = [site.submit(number) for number in range(201)]
    shown = [job["id"] for job in site.root.get("/state").json()["endpoints"][0]["jobs"]]
    assert shown == jobs[:0:-1]


def test_the_queue_depth_is_sampled_once_a_second(site: Site) -> None:
    site.submit()
    deadline = time.monotonic() + 10
    history: list[dict[str, Any]] = []
    while len(history) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        history = site.root.get("/state").json()["endpoints"][0]["history"]
    assert history[-1] == {"at": history[-1]["at"], "inQueue": 1, "inProgress": 0, "workers": 0, "initializing": 0}
    assert 0.8 < history[-1]["at"] - history[-2]["at"] < 5


def test_an_event_is_sent_after_a_change_with_only_new_history_points(site: Site) -> None:
    with httpx.stream("GET", f"{site.url}/state/events", timeout=10) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = (json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line)
        assert next(events)["endpoints"][0]["jobs"] == []
        job_id = site.submit()
        while not (document := next(events))["endpoints"][0]["jobs"]:
            pass
        assert document["endpoints"][0]["jobs"][0]["id"] == job_id
        points = [document["endpoints"][0]["history"] for document in (next(events) for _ in range(3))]
        times = [point["at"] for some in points for point in some]
        assert len(times) == len(set(times))


def test_waiting_clients_get_a_response_at_shutdown() -> None:
    with ExitStack() as clients, ThreadPoolExecutor(3) as pool:
        with emulator_with({"id": "ep", "longPoll": 60}) as emulator:
            site = Site(emulator, clients)
            runsync = pool.submit(site.client.post, "/runsync", json={"input": 1})
            chat = pool.submit(site.client.post, "/openai/v1/completions", json={})
            while site.client.get("/health").json()["jobs"]["inQueue"] < 2:
                time.sleep(0.01)
        assert runsync.result(20).json()["status"] == "CANCELLED"
        assert chat.result(20).status_code == 499


def test_event_streams_end_at_shutdown_even_without_workers() -> None:
    with ExitStack() as clients:
        with emulator_with({"id": "ep"}) as emulator:
            url = f"{emulator.url}/state/events"
            stream = clients.enter_context(httpx.stream("GET", url, timeout=20, verify=NO_CERTIFICATES))
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
        # Raises an error if the connection was aborted instead of closed.
        assert all(line.startswith("data: ") for line in lines if line)
