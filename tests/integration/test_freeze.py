"""Workers that are frozen and thawed, as by FlashBoot: real SDK, real HTTP, real processes, and SIGSTOP."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from engine.run_clock import FREEZE_S
from tests.integration.emulator.conftest import REPOSITORY, Site, eventually, site_with

CONNECTIONS = pytest.mark.parametrize("drops_connections", [False, True], ids=["kept", "dropped"])
WORDS = [f"word{number}" for number in range(12)]


def scripted(**settings: Any) -> dict[str, Any]:
    """Return settings of an endpoint whose workers repeat words, one each 0.1 s."""
    variables = {"PAUSE_S": "0.1", **settings.pop("env", {})}
    return {
        "command": [sys.executable, "-m", "tests.scripted_worker"],
        "cwd": str(REPOSITORY),
        "env": variables,
        "rateLimits": False,
        "pingInterval": 1000,
        **settings,
    }


def stream_of(site: Site, job: str) -> list[str]:
    """Read a stream to its end; return the texts of its outputs."""
    texts: list[str] = []
    while True:
        answer = site.client.get(f"/stream/{job}").raise_for_status().json()
        texts += [item["output"]["text"] for item in answer["stream"]]
        if answer["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
            assert answer["status"] == "COMPLETED"
            return texts


def lines_with(site: Site, worker: str, text: str) -> list[str]:
    return [line for line in site.log_of(worker) if text in line]


def test_an_idle_worker_is_frozen_and_answers_the_next_job_when_it_is_thawed() -> None:
    with site_with(**scripted(flashboot=True, idleTimeout=0.5, scalerType="REQUEST_COUNT")) as site:
        first = site.ended(site.submit({"prompt": "one"}))
        eventually(lambda: site.state()["workers"][0]["state"] == "frozen")
        time.sleep(FREEZE_S + 0.5)

        second = site.ended(site.submit({"prompt": "two", "stream": True}))

        assert [part["text"] for part in second["output"]] == ["two "]
        assert second["workerId"] == first["workerId"]
        events = [event["text"] for event in site.state()["events"]]
        assert len([event for event in events if event.endswith(" started")]) == 1
        assert len([event for event in events if "restored after" in event]) == 1
        assert len([event for event in events if "after it was restored" in event]) == 1
        worker = second["workerId"]
        assert len(lines_with(site, worker, "Restored: the process did not run for")) == 1
        assert len(lines_with(site, worker, "First output since the restore")) == 1


@CONNECTIONS
def test_a_job_that_is_frozen_in_mid_stream_goes_on_where_it_was(drops_connections: bool) -> None:
    """The freeze is longer than the job may take, and shorter than the platform waits for a sign of it."""
    settings = scripted(workersMin=1, lostAfter=20, env={"EXECUTION_TIMEOUT_S": "5"})
    with site_with(tls=True, **settings) as site:
        worker = site.idle_workers(1)[0]["id"]
        job = site.submit({"prompt": " ".join(WORDS), "stream": True})
        eventually(lambda: site.state()["jobs"][0]["outputs"] >= 3)
        site.freeze(worker, drops_connections=drops_connections)
        frozen_at = site.state()["jobs"][0]["outputs"]
        time.sleep(5.5)
        assert site.state()["jobs"][0]["outputs"] <= frozen_at + 1
        site.thaw(worker)

        ended = site.ended(job)

        assert "".join(part["text"] for part in ended["output"]).split() == WORDS
        streamed = "".join(stream_of(site, job)).split()
        if not drops_connections:
            assert streamed == WORDS
        # Of an output that was on its way when its connection was dropped, nobody knows whether it has arrived.
        assert list(dict.fromkeys(streamed)) == WORDS
        assert len(streamed) <= len(WORDS) + 1
        assert site.health()["jobs"]["retried"] == 0
        assert lines_with(site, worker, "Restored: ")[0].endswith("1 jobs in progress")


@CONNECTIONS
def test_a_job_that_another_worker_got_meanwhile_has_one_answer(drops_connections: bool) -> None:
    settings = scripted(workersMin=2, workersMax=2, lostAfter=3)
    with site_with(**settings) as site:
        site.idle_workers(2)
        job = site.submit({"prompt": " ".join(WORDS), "stream": True})
        worker = str(eventually(lambda: site.status(job).get("workerId")))
        eventually(lambda: site.state()["jobs"][0]["outputs"] >= 3)
        site.freeze(worker, drops_connections=drops_connections)
        eventually(lambda: site.status(job).get("workerId") not in (None, worker))
        site.thaw(worker)

        streamed = stream_of(site, job)

        ended = site.status(job)
        assert ended["workerId"] != worker
        assert "".join(part["text"] for part in ended["output"]).split() == WORDS
        assert "".join(streamed).split()[-len(WORDS) :] == WORDS
        eventually(lambda: lines_with(site, worker, "the platform refused"))
        assert site.health()["jobs"]["completed"] == 1
