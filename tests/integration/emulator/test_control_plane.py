"""Endpoints that the control plane creates, with real workers under load: the scripted engine under the real SDK."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from emulator.app import run_in_thread
from emulator.settings import EmulatorSettings
from tests.control_plane import ControlPlaneClient, check
from tests.integration.emulator.conftest import KEY, REPOSITORY, alive, eventually

SCRIPTED = [sys.executable, "-m", "tests.scripted_worker"]
ARRIVAL_S = 0.1
SHORT_DELAY = {"type": "QUEUE_DELAY", "queueDelay": 0.5}
WORDS = "one two three four five six"


@contextmanager
def emulator(**endpoint: Any) -> Iterator[ControlPlaneClient]:
    """Run an emulator without endpoints; those that are created have these settings."""
    base = {"command": SCRIPTED, "cwd": str(REPOSITORY), "longPoll": 5, "grace": 60, "healthInterval": 0.2, **endpoint}
    control_plane = {"endpoint": base, "rateLimits": None}
    document = {"port": 0, "apiKeys": [KEY], "endpoints": [], "controlPlane": control_plane}
    with ExitStack() as stack:
        running = stack.enter_context(run_in_thread(EmulatorSettings.model_validate(document)))
        headers = {"Authorization": f"Bearer {KEY}"}
        client = httpx.Client(base_url=running.url, headers=headers, timeout=60)
        yield ControlPlaneClient(stack.enter_context(client))


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlaneClient]:
    with emulator() as running:
        yield running


class OpenLoop(threading.Thread):
    """Submits a streamed job every `ARRIVAL_S`, whatever becomes of the last ones, until it is stopped."""

    def __init__(self, plane: ControlPlaneClient, urls: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self.ids: list[str] = []
        self._plane = plane
        self._urls = urls
        self._stopped = threading.Event()

    def run(self) -> None:
        value = {"openai_route": "/v1/completions", "openai_input": {"prompt": WORDS, "stream": True}}
        with httpx.Client(headers=self._plane.http.headers, timeout=60) as client:
            while not self._stopped.wait(ARRIVAL_S):
                response = client.post(self._urls["run"], json={"input": value}).raise_for_status()
                self.ids.append(response.json()["id"])

    def results(self) -> list[dict[str, Any]]:
        """Stop; return the state of each job, when all have ended."""
        self._stopped.set()
        self.join()

        def ended(job_id: str) -> dict[str, Any]:
            url = self._urls["status"].format(job_id=job_id)
            status: dict[str, Any] = self._plane.http.get(url).raise_for_status().json()
            return {} if status["status"] in ("IN_QUEUE", "IN_PROGRESS") else status

        return [eventually(partial(ended, job_id)) for job_id in self.ids]


def pids(plane: ControlPlaneClient, endpoint: str) -> dict[str, int]:
    """Return the process of each worker of an endpoint."""
    endpoints = plane.http.get("/state").json()["endpoints"]
    (state,) = [one for one in endpoints if one["id"] == endpoint]
    return {worker["id"]: worker["pid"] for worker in state["workers"] if worker["pid"] is not None}


def variable(pid: int, name: str) -> str | None:
    """Return a variable of a worker's process: the launcher's child has the same environment."""
    variables = dict(line.partition("=")[::2] for line in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return variables.get(name)


def rolled_out(plane: ControlPlaneClient, endpoint: str, version: int, workers: int) -> bool:
    document = plane.releases(endpoint)
    rollout = document["rollout"]
    on_latest = [worker for worker in plane.workers(endpoint)["workers"] if worker["status"] in ("IDLE", "RUNNING")]
    return (
        document["endpointVersion"] == version
        and not rollout["inProgress"]
        and rollout["percentOnLatest"] == 100
        and len(on_latest) == workers
    )


def test_releases_roll_out_and_back_under_load_and_no_job_fails(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(
        env={"PAUSE_S": "0.05", "RELEASE": "1"},
        workers={"min": 2, "max": 2},
        scaling={"type": "REQUEST_COUNT", "requestCount": 4},
    )
    name = endpoint["id"]
    eventually(lambda: rolled_out(plane, name, 1, 2))
    load = OpenLoop(plane, endpoint["requestUrls"])
    load.start()
    eventually(lambda: plane.workers(name)["summary"]["running"])
    first = pids(plane, name)
    plane.patch(name, image="me/vllm:2", env={"PAUSE_S": "0.05", "RELEASE": "2"})
    stale = plane.workers(name)["workers"]
    assert {(worker["id"], worker["version"], worker["image"]) for worker in stale if worker["isStale"]} <= {
        (worker, 1, "me/vllm:1") for worker in first
    }
    eventually(lambda: rolled_out(plane, name, 2, 2), 60)
    second = pids(plane, name)
    assert not first.keys() & second.keys()
    assert {variable(pid, "RELEASE") for pid in second.values()} == {"2"}
    assert [worker["image"] for worker in plane.workers(name)["workers"]] == ["me/vllm:2", "me/vllm:2"]

    previous = plane.releases(name)["releases"][0]["diff"]
    old = {change["field"]: change["old"] for change in previous}
    plane.patch(name, image=old["template.imageName"], env=old["template.env"])
    eventually(lambda: rolled_out(plane, name, 3, 2), 60)
    assert {variable(pid, "RELEASE") for pid in pids(plane, name).values()} == {"1"}

    results = load.results()
    assert len(results) > 20
    assert {(result["status"], result.get("retries", 0)) for result in results} == {("COMPLETED", 0)}
    assert all("six" in "".join(result["output"]) for result in results)

    processes = pids(plane, name)
    plane.delete(name)
    eventually(lambda: not any(map(alive, processes.values())))


def test_deleting_an_endpoint_cancels_its_jobs_and_stops_its_workers(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(env={"PAUSE_S": "0.2"}, workers={"min": 1, "max": 1})
    urls, name = endpoint["requestUrls"], endpoint["id"]
    answers: list[dict[str, Any]] = []
    a_minute = {"prompt": "word " * 300, "stream": True}
    value = {"openai_route": "/v1/completions", "openai_input": a_minute}

    def ask() -> None:
        response = httpx.post(urls["runSync"], json={"input": value}, headers=plane.http.headers, timeout=60)
        answers.append(response.json())

    client = threading.Thread(target=ask)
    client.start()
    eventually(lambda: plane.workers(name)["summary"]["running"])
    (process,) = pids(plane, name).values()
    plane.delete(name)
    client.join(10)
    assert [answer["status"] for answer in answers] == ["CANCELLED"]
    # The worker was told to stop the job: it does not finish it first.
    eventually(lambda: not alive(process))


def test_a_load_balancing_endpoint_is_created_released_and_deleted(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(
        type="LOAD_BALANCER",
        scaling={"type": "REQUEST_COUNT", "requestCount": 4},
        workers={"min": 2, "max": 2, "idleTimeout": 60},
        env={"PAUSE_S": "0.05", "HEALTH_CHECK_PATH": "/healthy"},
    )
    name, base = endpoint["id"], endpoint["requestUrls"]["base"]
    assert endpoint["requestUrls"]["health"] == f"{base}/healthy"
    eventually(lambda: rolled_out(plane, name, 1, 2))
    statuses: list[int] = []
    stopped = threading.Event()

    def ask() -> None:
        with httpx.Client(headers=plane.http.headers, timeout=60) as client:
            while not stopped.wait(ARRIVAL_S / 2):
                statuses.append(client.post(f"{base}/v1/completions", json={"prompt": "hello"}).status_code)

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    plane.patch(name, image="me/vllm:2")
    eventually(lambda: rolled_out(plane, name, 2, 2), 60)
    answered = len(statuses)
    eventually(lambda: len(statuses) > answered)
    stopped.set()
    for client in clients:
        client.join()
    assert set(statuses) == {200}
    processes = pids(plane, name)
    plane.delete(name)
    eventually(lambda: not any(map(alive, processes.values())))

    def is_closed() -> bool:
        try:
            return not httpx.get(base)
        except httpx.ConnectError:
            return True

    eventually(is_closed)


def test_a_frozen_worker_is_scaled_down_and_comes_back(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(flashboot="FLASHBOOT", workers={"max": 1, "idleTimeout": 1}, scaling=SHORT_DELAY)
    name, run_sync = endpoint["id"], endpoint["requestUrls"]["runSync"]
    job = {"input": {"openai_route": "/v1/completions", "openai_input": {"prompt": "hello"}}}
    first = plane.http.post(run_sync, json=job).json()
    eventually(lambda: plane.workers(name)["summary"]["total"] == 0)
    second = plane.http.post(run_sync, json=job).json()
    assert (first["status"], second["status"]) == ("COMPLETED", "COMPLETED")
    assert first["workerId"] == second["workerId"]
    plane.delete(name)


def test_an_image_that_cannot_be_pulled_is_seen_in_the_systems_log_and_replaced(plane: ControlPlaneClient) -> None:
    plane.http.put("/faults", json={"missing_images": ["me/vllm:typo"]}).raise_for_status()
    name = plane.create(image="me/vllm:typo", workers={"min": 1, "max": 1})["id"]
    (worker,) = eventually(lambda: plane.workers(name)["workers"])
    assert (worker["status"], worker["image"]) == ("INITIALIZING", "me/vllm:typo")

    def lines() -> Iterator[dict[str, Any]]:
        url = f"/v2/serverless/{name}/workers/{worker['id']}/logs?source=system"
        with plane.http.stream("GET", url) as response:
            check_head(response)
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    assert any("error pulling image: " in line["line"] for line in lines())
    plane.patch(name, image="me/vllm:1")
    eventually(lambda: plane.workers(name)["summary"]["idle"])
    plane.delete(name)


def test_a_log_is_followed_and_resumed_where_it_broke_off(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(workers={"min": 1, "max": 1})
    name = endpoint["id"]
    (worker,) = eventually(lambda: plane.workers(name)["workers"])
    url = f"/v2/serverless/{name}/workers/{worker['id']}/logs"

    def follow(cursor: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        headers = {"Last-Event-ID": cursor} if cursor else {}
        with plane.http.stream("GET", url, headers=headers) as response:
            check_head(response)
            for line in response.iter_lines():
                if line.startswith("id: "):
                    event_id = line.removeprefix("id: ")
                elif line.startswith("data: "):
                    yield event_id, json.loads(line.removeprefix("data: "))

    seen: list[tuple[str, dict[str, Any]]] = []
    for event in follow(None):
        seen.append(event)
        if len(seen) == 3:
            break
    plane.http.post(endpoint["requestUrls"]["run"], json={"input": {"prompt": "hello"}}).raise_for_status()
    eventually(lambda: plane.http.get(endpoint["requestUrls"]["health"]).json()["jobs"]["completed"])
    deleted = threading.Timer(0.5, plane.delete, (name,))
    deleted.start()
    # The stream ends by itself when the worker has exited.
    seen += follow(seen[-1][0])
    deleted.join()
    ids = [event_id for event_id, _ in seen]
    assert ids == sorted(set(ids))
    texts = [(document["source"], document["line"]) for _, document in seen]
    assert texts[0] == ("system", "create container me/vllm:1")
    assert ("system", "start container for me/vllm:1: begin") in texts
    assert any(source == "container" and '"completed"' in text for source, text in texts)
    assert texts[-1] == ("system", "remove container me/vllm:1")


def test_a_secret_of_an_endpoint_is_in_no_log() -> None:
    script = "import os, time; print('the token is', os.environ['HF_TOKEN'], flush=True); time.sleep(600)"
    with emulator(command=[sys.executable, "-c", script], grace=1) as plane:
        name = plane.create(env={"HF_TOKEN": "hf_of_version_1"}, workers={"min": 1, "max": 1})["id"]

        def shown() -> str:
            state = json.dumps(plane.http.get("/state").json())
            return state if state.count("the token is ***") == len(seen) + 1 else ""

        seen: list[str] = []
        seen.append(eventually(shown))
        plane.patch(name, env={"HF_TOKEN": "hf_of_version_2"})
        seen.append(eventually(shown))
        assert "hf_of_version" not in "".join(seen)
        assert plane.get(f"serverless/{name}")["env"] == {"HF_TOKEN": "hf_of_version_2"}


def test_scaling_is_applied_promptly_and_is_no_release() -> None:
    with emulator(command=["sleep", "600"], grace=1) as plane:
        name = plane.create(workers={"min": 1, "max": 1})["id"]
        (first,) = eventually(lambda: plane.workers(name)["workers"])
        plane.patch(name, workers={"min": 2, "max": 2})
        workers = eventually(lambda: workers if len(workers := plane.workers(name)["workers"]) == 2 else [])
        assert workers[0]["id"] == first["id"]
        assert {worker["version"] for worker in workers} == {1}


def check_head(response: httpx.Response) -> None:
    """Check what is known of a stream before it is read."""
    check(response)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


def test_the_command_line_starts_without_an_endpoint(command_line: Any) -> None:
    site = command_line("--no-endpoint", "--command", " ".join(SCRIPTED), "--no-rate-limits").site
    plane = ControlPlaneClient(site.root)
    assert plane.get("serverless") == {"endpoints": []}
    endpoint = plane.create(scaling={"type": "REQUEST_COUNT", "requestCount": 1})
    started = time.monotonic()
    job = {"input": {"openai_route": "/v1/completions", "openai_input": {"prompt": "hello"}}}
    assert site.root.post(endpoint["requestUrls"]["runSync"], json=job).json()["output"] == [{"said": "hello"}]
    assert time.monotonic() - started < 60
