"""Real workers are started and stopped with the load."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Any

import openai

from tests.integration.emulator.conftest import KEY, WORKER, CommandLine, Start, alive, eventually


async def forty_chats(url: str) -> list[str | None]:
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": f"sleep 0.5 {n}"}])
                for n in range(40)
            )
        )
    return [answer.choices[0].message.content for answer in answers]


def test_forty_concurrent_requests_start_two_workers_that_stop_when_idle(
    command_line: Callable[..., CommandLine],
) -> None:
    emulator = command_line(
        *("--command", f"{sys.executable} {WORKER}", "--scaler-type", "QUEUE_DELAY", "--scaler-value", "1"),
        *("--workers-max", "2", "--idle-timeout", "2", "--env", "CONCURRENCY=2", "--quiet"),
    )
    site = emulator.site
    assert site.health()["workers"] == dict.fromkeys(
        ("idle", "initializing", "ready", "running", "throttled", "unhealthy"), 0
    )
    answers = asyncio.run(forty_chats(site.openai_url))
    assert answers == [f"echo: sleep 0.5 {number}" for number in range(40)]

    pids: set[int] = set()
    pids.update(worker["pid"] for worker in site.state()["workers"])
    eventually(lambda: site.state()["workers"] == [])
    state = site.state()
    counts = [point["workers"] + point["initializing"] for point in state["history"]]
    for event in state["events"]:
        sys.stdout.write(f"{event['at'] - state['events'][0]['at']:6.2f} s  {event['text']}\n")
    sys.stdout.write(f"workers, once a second: {counts}\n")
    assert counts[0] == 0
    assert max(counts) == 2
    assert len(state["gone"]) == 2
    # The first starts when a job has waited a second, the second at least a second later.
    first, second = sorted(worker["startedAt"] for worker in state["gone"])
    assert first - state["jobs"][-1]["submittedAt"] >= 1
    assert second - first >= 1
    # Both ran jobs, and were stopped after two idle seconds.
    assert {job["workerId"] for job in state["jobs"]} == {worker["id"] for worker in state["gone"]}
    for worker in state["gone"]:
        assert (worker["reason"], worker["exitCode"]) == ("idle for 2 s", 0)
        last = max(job["endedAt"] for job in state["jobs"] if job["workerId"] == worker["id"])
        assert worker["since"] - last >= 2
    assert site.health()["jobs"] == {"completed": 40, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0}
    assert not any(alive(pid) for pid in pids)
    emulator.process.send_signal(signal.SIGTERM)
    assert emulator.process.wait(20) == 0


def test_a_worker_killed_during_a_job_is_replaced_and_the_job_completes(start: Start) -> None:
    site = start(workersMin=1)
    (worker,) = site.idle_workers(1)
    job_id = site.submit({"count": 20, "sleep": 0.1})
    eventually(lambda: site.status(job_id)["status"] == "IN_PROGRESS")
    site.root.post(f"/workers/{worker['id']}/kill").raise_for_status()
    state = site.ended(job_id)
    assert (state["status"], state["retries"]) == ("COMPLETED", 1)
    assert state["workerId"] != worker["id"]
    assert len(state["output"]) == 20


def test_a_kill_fault_kills_the_worker_that_sent_the_request(start: Start) -> None:
    site = start(workersMin=1)
    (worker,) = site.idle_workers(1)
    site.faults({"kind": "kill", "route": "job-stream", "times": 1})
    state = site.ended(site.submit({"count": 3}))
    assert (state["status"], state["retries"], len(state["output"])) == ("COMPLETED", 1, 3)
    assert state["workerId"] != worker["id"]


def test_a_job_past_its_execution_timeout_is_stopped_and_its_worker_continues(start: Start) -> None:
    site = start(workersMin=1, executionTimeoutMs=3000)
    (worker,) = site.idle_workers(1)
    job_id = site.submit({"count": 1000, "sleep": 0.1})
    state = site.ended(job_id)
    assert (state["status"], state["error"]) == ("TIMED_OUT", "executionTimeout exceeded")
    next_state = site.ended(site.submit({"count": 1}))
    assert (next_state["status"], next_state["workerId"]) == ("COMPLETED", worker["id"])


def test_stop_pod_stops_the_worker_after_its_job(start: Start) -> None:
    site = start(workersMin=1, env={"REFRESH": "1"})
    (worker,) = site.idle_workers(1)
    state = site.ended(site.submit({"count": 1}))
    assert (state["status"], state["workerId"]) == ("COMPLETED", worker["id"])
    exited: list[dict[str, Any]] = eventually(lambda: site.state()["gone"])
    assert (exited[0]["id"], exited[0]["exitCode"]) == (worker["id"], 0)
    assert site.ended(site.submit({"count": 1}))["workerId"] != worker["id"]
