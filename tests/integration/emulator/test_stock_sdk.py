"""The stock SDK's job loop (runpod 1.12.0) against the emulator: what works, and its bugs.

The tests document each bug, which this repository's own loop must not have.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from emulator.free_port import free_port
from tests.integration.emulator.conftest import REPOSITORY, WORKER, Start, eventually


def test_five_hundred_jobs_are_all_completed(start: Start) -> None:
    site = start(workersMax=2, scalerValue=100, rateLimits=False, env={"CONCURRENCY": "20", "RUNPOD_LOG_LEVEL": "INFO"})
    with ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda number: site.submit({"count": 1 + number % 3}), range(500)))
    eventually(lambda: site.health()["jobs"]["completed"] == 500, 100)
    states = [site.status(job_id) for job_id in jobs]
    assert Counter(state["status"] for state in states) == {"COMPLETED": 500}
    assert [len(state["output"]) for state in states] == [1 + number % 3 for number in range(500)]
    assert site.health()["jobs"] == {"completed": 500, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0}


def test_a_job_queued_after_sigterm_is_taken_but_never_run(start: Start) -> None:
    """The long poll continues after the signal. Its job is queued in the process but not run, and the exit code is 0.

    It exits when its long poll for stop signals has ended too.
    """
    site = start(workersMin=1, longPoll=5)
    (worker,) = site.idle_workers(1)
    os.kill(worker["pid"], signal.SIGTERM)
    eventually(lambda: any("Kill worker" in line for line in _log(site, worker["id"])))
    # The loop that runs jobs checks every 0.1 s whether to stop, and logs nothing when it does.
    time.sleep(0.5)
    job_id = site.submit({"count": 1})
    ended = eventually(lambda: [it for it in site.state()["gone"] if it["id"] == worker["id"]])
    assert (ended[0]["exitCode"], ended[0]["jobsTaken"]) == (0, 1)
    assert not any("Handling Job" in line for line in ended[0]["log"])
    # The platform must detect the loss and give the job to another worker.
    state = site.ended(job_id)
    assert (state["status"], state["retries"]) == ("COMPLETED", 1)
    assert state["workerId"] != worker["id"]


def _log(site: Any, worker: str) -> list[str]:
    return [line for it in site.state()["workers"] if it["id"] == worker for line in it["log"]]


def test_a_rejected_result_is_lost(start: Start) -> None:
    """The worker logs the error and continues; the job is lost once the worker's pings no longer report it."""
    site = start(workersMin=1, pingInterval=1000, lostAfter=3, maxRetries=0)
    site.idle_workers(1)
    site.faults({"kind": "error", "route": "job-done", "status": 400, "times": 1})
    job_id = site.submit({"count": 1})
    state = site.ended(job_id)
    assert (state["status"], state["error"]) == ("FAILED", "job timed out after 0 retries")
    assert any("Failed to return job results." in line for line in site.state()["workers"][0]["log"])


def test_a_result_above_the_limit_is_lost(start: Start) -> None:
    site = start(workersMin=1, pingInterval=1000, lostAfter=3, maxRetries=0, env={"RUNPOD_LOG_LEVEL": "INFO"})
    # Each output is below its limit, but the aggregate result is above.
    job_id = site.submit({"count": 21, "padding": 990_000})
    assert site.ended(job_id)["status"] == "FAILED"
    assert any("Failed to return job results." in line for line in site.state()["workers"][0]["log"])


def test_an_output_is_dropped_after_three_attempts(start: Start) -> None:
    site = start(workersMin=1)
    site.idle_workers(1)
    site.faults({"kind": "error", "route": "job-stream", "times": 3})
    job_id = site.submit({"count": 2})
    assert site.ended(job_id)["status"] == "COMPLETED"
    assert site.root.get("/faults").json()["struck"] == [3]
    assert site.client.get(f"/stream/{job_id}").json()["stream"] == [{"output": {"number": 1}}]


def test_an_output_whose_response_is_lost_is_posted_twice(start: Start) -> None:
    """The SDK cannot know that the output was received, and posts it again."""
    site = start(workersMin=1)
    site.idle_workers(1)
    site.faults({"kind": "error", "route": "job-stream", "when": "after", "times": 1})
    job_id = site.submit({"count": 1})
    assert site.ended(job_id)["status"] == "COMPLETED"
    assert site.client.get(f"/stream/{job_id}").json()["stream"] == [{"output": {"number": 0}}] * 2


def test_the_test_input_option_never_runs_a_streaming_handler() -> None:
    ran = subprocess.run(
        [sys.executable, str(WORKER), "--test_input", json.dumps({"input": {"count": 1}})],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0
    assert "<async_generator object" in ran.stdout
    assert "number" not in ran.stdout.replace("number of", "")


def test_the_development_server_never_runs_a_job_of_its_queue() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port)]
    server = subprocess.Popen([sys.executable, str(WORKER), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: _answers(url))
        job_id = httpx.post(f"{url}/run", json={"input": {"count": 1}}).json()["id"]
        assert httpx.get(f"{url}/status/{job_id}").status_code == 405
        for path in (f"/cancel/{job_id}", "/purge-queue", "/openai/v1/chat/completions"):
            assert httpx.post(url + path, json={}).status_code == 404
        assert httpx.get(f"{url}/health").status_code == 404
        # An exception in the handler is an error of the server, not of the job.
        broken = {"openai_route": "/v1/chat/completions", "openai_input": _RAISE}
        assert httpx.post(f"{url}/runsync", json={"input": broken}, timeout=20).status_code == 500
    finally:
        server.terminate()
        output = server.communicate(timeout=20)[0].decode()
    # The job of /run was never started.
    assert f"{job_id} | Started" not in output


_RAISE = {"model": "tiny", "messages": [{"role": "user", "content": "raise"}]}


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/docs").status_code < 500
    except httpx.TransportError:
        return False


def test_a_managed_worker_is_accepted_with_the_key_of_its_users_account(start: Start) -> None:
    """The SDK prefers the key in `~/.runpod/config.toml` to the one in its environment."""
    site = start(workersMin=1, env={"RUNPOD_AI_API_KEY": "the-key-of-an-account"})
    assert site.ended(site.submit({"count": 1}))["status"] == "COMPLETED"


def test_a_dead_engine_stops_the_worker_under_the_stock_loop_too(start: Start) -> None:
    """The stock loop would go on taking jobs and failing each."""
    site = start(
        command=[sys.executable, "-m", "tests.scripted_worker"],
        cwd=str(REPOSITORY),
        env={"LOOP": "stock", "FAILS_AFTER_S": "4", "PAUSE_S": "0.5"},
        workersMin=1,
        workersMax=1,
        maxRetries=0,
    )
    (worker,) = site.idle_workers(1)
    job_id = site.submit({"prompt": " ".join(["word"] * 60), "stream": True})

    failed = site.ended(job_id)
    (exited,) = eventually(lambda: [it for it in _exited(site) if it["id"] == worker["id"]])

    assert json.loads(failed["error"])["retryable"] is True
    assert exited["exitCode"] == 1
    assert any("Using the SDK's own loop" in line for line in exited["log"])
    assert any("The worker has failed: the engine's process is dead" in line for line in exited["log"])


def _exited(site: Any) -> list[dict[str, Any]]:
    return [worker for worker in (*site.state()["gone"], *site.state()["workers"]) if worker["exitCode"] is not None]
