"""What a worker's log says that waiting does not help."""

from __future__ import annotations

import asyncio

import pytest

from deploy.api import Api, LogLine
from deploy.context import Context
from deploy.errors import WorkerError
from deploy.start import PHASES, StartWatcher, fault_in
from tests.unit.deploy.conftest import Terminal
from tests.unit.deploy.fakes import FakeRunPod
from tests.unit.deploy.test_api import body


@pytest.mark.parametrize(
    ("source", "line", "says"),
    [
        ("system", "error pulling image: Error response from daemon: manifest for x/y:1 not found: manifest unknown",
         "the image x/y:1 cannot be pulled"),
        ("system", "pull access denied for x/y, repository does not exist or may require 'docker login'", "--registry"),
        ("system", "failed to pull image: toomanyrequests: rate limit exceeded", "cannot be pulled"),
        ("system", "write /layer.tar: no space left on device", "the disk is full"),
        ("container", "The worker cannot start: MAX_MODEL_LEN=x is not allowed", "cannot start: MAX_MODEL_LEN"),
        ("container", "The worker has failed: the engine's process is dead", "the engine's process is dead"),
        ("container", "OSError: [Errno 28] No space left on device", "enlarge --disk"),
        ("system", "image pull: x/y:1: pending", None),
        ("system", "Status: Downloaded newer image for x/y:1", None),
        ("container", "401 unauthorized", None),
        ("container", "manifest unknown", None),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_what_to_change(source: str, line: str, says: str | None) -> None:
    fault = fault_in(LogLine("1", source, line, "2026-06-01T12:05:04Z"), "x/y:1")

    assert (fault is None) if says is None else (fault is not None and says in fault)


def worker(status: str) -> dict[str, object]:
    return {"id": "w1", "status": status, "isStale": False, "gpuCount": 1, "image": "x/y:1", "version": 1}


async def watched(context: Context, api: Api) -> StartWatcher:
    progress = context.console.progress(PHASES)
    watcher = StartWatcher(api, "ep1", context.console, progress, poll_s=0.01)
    await asyncio.wait_for(watcher.watch(), 0.5)
    return watcher


def test_a_fault_in_the_log_ends_the_wait(context: Context, api: Api, runpod: FakeRunPod, terminal: Terminal) -> None:
    runpod.add(body())
    runpod.workers = [worker("INITIALIZING")]
    runpod.logs = [("system", "create container x/y:1"), ("container", "The worker cannot start: no memory")]

    with pytest.raises(WorkerError, match="the worker cannot start: no memory"):
        asyncio.run(watched(context, api))

    assert "s  image" in terminal.messages
    assert "s  start" in terminal.messages


def test_a_container_that_exits_again_and_again_ends_the_wait(context: Context, api: Api, runpod: FakeRunPod) -> None:
    runpod.add(body())
    runpod.workers = [worker("INITIALIZING")]
    runpod.logs = [("container", "boom"), *[("system", "worker exited with exit code 1")] * 3]

    with pytest.raises(WorkerError, match="exits with 1 again and again; its last line: boom"):
        asyncio.run(watched(context, api))


def test_throttled_workers_are_told_once(context: Context, api: Api, runpod: FakeRunPod, terminal: Terminal) -> None:
    runpod.add(body())
    runpod.workers = [worker("THROTTLED")]

    with pytest.raises(TimeoutError):
        asyncio.run(watched(context, api))

    assert terminal.messages.count("no GPU of the endpoint's pools is free") == 1
    assert not [one for one in runpod.requests if one.endswith("/logs")]


@pytest.mark.parametrize("resumes_at_last", [False, True])
def test_a_log_is_read_once_though_its_stream_ends(
    context: Context, api: Api, runpod: FakeRunPod, *, resumes_at_last: bool
) -> None:
    """The stream is opened again where it ended."""
    runpod.add(body())
    runpod.resumes_at_last = resumes_at_last
    runpod.workers = [worker("INITIALIZING")]
    runpod.logs = [("system", "worker exited with exit code 1")]

    with pytest.raises(TimeoutError):
        asyncio.run(watched(context, api))

    assert len([one for one in runpod.requests if one.endswith("/logs")]) > 3


def test_what_a_worker_that_serves_has_logged_once_is_no_fault(context: Context, api: Api, runpod: FakeRunPod) -> None:
    """It could not write its cache, and serves all the same: `up` again must not fail for that."""
    runpod.add(body())
    runpod.workers = [worker("IDLE")]
    runpod.logs = [
        ("container", "OSError: [Errno 28] No space left on device"),
        *[("system", "exited with code 1")] * 3,
    ]

    with pytest.raises(TimeoutError):
        asyncio.run(watched(context, api))


def test_a_container_that_says_nothing_has_started(
    context: Context, api: Api, runpod: FakeRunPod, terminal: Terminal
) -> None:
    runpod.add(body())
    runpod.workers = [worker("INITIALIZING")]
    runpod.logs = [("system", "create container x/y:1"), ("system", "start container for x/y:1: begin")]

    with pytest.raises(TimeoutError):
        asyncio.run(watched(context, api))

    assert [line.split()[-1] for line in terminal.messages.splitlines()] == ["image", "start"]
