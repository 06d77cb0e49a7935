"""Workers of a load-balancing endpoint that are frozen and thawed: real processes, SIGSTOP, and HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from engine.run_clock import FREEZE_S
from tests.integration.balancer.conftest import Site
from tests.integration.balancer.test_scripted_processes import words
from tests.integration.emulator.conftest import eventually

Start = Callable[..., Site]
WORDS = [f"word{number}" for number in range(12)]


def outputs(site: Site) -> int:
    return sum(job["outputs"] for job in site.state()["jobs"])


def test_an_idle_worker_is_frozen_and_answers_the_next_request_when_it_is_thawed(start: Start) -> None:
    site = start(flashboot=True, idleTimeout=0.5, workersMin=0, workersMax=1, env={"WARM_UP": "true"})
    assert words(site.client, "one") == ["one", "[DONE]"]
    eventually(lambda: site.workers("frozen"))
    time.sleep(FREEZE_S + 0.5)

    assert words(site.client, "two") == ["two", "[DONE]"]

    events = [event["text"] for event in site.state()["events"]]
    assert len([event for event in events if event.endswith(" started")]) == 1
    assert len([event for event in events if "after it was restored" in event]) == 1
    assert len(site.lines_with("Warm-up: /v1/chat/completions answered")) == 1
    assert len(site.lines_with("Restored: the process did not run for")) == 1
    eventually(lambda: site.lines_with("First output since the restore"))


def test_a_stream_that_is_frozen_on_a_connection_that_lasts_goes_on_where_it_was(start: Start) -> None:
    """Answer and freeze together are longer than the request may take."""
    variables = {"PAUSE_S": "0.2", "EXECUTION_TIMEOUT_S": "5"}
    site = start(workersMin=1, workersMax=1, env=variables)
    (worker,) = site.idle_workers(1)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(words, site.client, " ".join(WORDS))
        eventually(lambda: outputs(site) >= 3)
        site.freeze(worker["id"], drops_connections=False)
        time.sleep(3.5)
        assert outputs(site) < len(WORDS)
        site.thaw(worker["id"])

        assert stream.result(60) == [*WORDS, "[DONE]"]
    assert site.lines_with("Restored: ")[0].endswith("1 requests in progress")


def test_a_request_whose_connection_was_dropped_in_a_freeze_ends_on_both_sides(start: Start) -> None:
    site = start(workersMin=1, workersMax=1, env={"PAUSE_S": "0.1"})
    (worker,) = site.idle_workers(1)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(words, site.client, "word " * 600)
        eventually(lambda: outputs(site) >= 3)
        site.freeze(worker["id"])
        with pytest.raises(httpx.RemoteProtocolError):
            stream.result(10)
    time.sleep(FREEZE_S + 0.5)
    site.thaw(worker["id"])

    assert words(site.client, "next") == ["next", "[DONE]"]
    eventually(lambda: site.lines_with('"status": "stopped"'))
