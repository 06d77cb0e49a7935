"""A result above the platform's limit, end to end: the real SDK, the real job loop, the emulator, a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine.queue.protocol import MAX_RESULT_BYTES
from tests.emulator_queue import EmulatorQueue, emulator_queue
from tests.processes import Process, running
from tests.s3_server import KEY, KEY_ID, S3Server, s3_server

TEXT = "漢字" * 100_000
TIMES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("large")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[S3Server]:
    with s3_server(folder) as started:
        yield started


@pytest.fixture(scope="module")
def queue() -> Iterator[EmulatorQueue]:
    with emulator_queue() as started:
        yield started


@pytest.fixture(scope="module")
def worker(folder: Path, server: S3Server, queue: EmulatorQueue) -> Iterator[Process]:
    environment = {**queue.environment, **server.environment, "BUCKET_LINK_EXPIRES_S": "600"}
    with running(["-m", "tests.scripted_worker"], environment, folder / "log") as process:
        process.wait_for(queue.has_worker)
        yield process


def test_a_result_above_the_platforms_limit_is_a_link_that_anyone_can_fetch(
    worker: Process, queue: EmulatorQueue
) -> None:
    job = queue.run({"openai_route": "/v1/completions", "openai_input": {"prompt": TEXT, "n": TIMES}})

    status = job.status()
    assert status["status"] == "COMPLETED", status.get("error")
    (link,) = status["output"]
    fetched = httpx.get(link["output_url"])
    assert fetched.status_code == httpx.codes.OK
    assert len(fetched.content) == link["size_bytes"] > MAX_RESULT_BYTES
    assert fetched.json() == [{"said": TEXT * TIMES}]
    assert "X-Amz-Expires=600&" in link["output_url"]
    assert KEY not in worker.log
    assert KEY_ID not in worker.log
    assert link["output_url"] not in worker.log


def test_a_smaller_result_is_delivered_as_before(worker: Process, server: S3Server, queue: EmulatorQueue) -> None:
    before = sorted(server.directory.rglob("*"))

    job = queue.run({"openai_route": "/v1/completions", "openai_input": {"prompt": TEXT, "n": 10}})

    assert job.status()["output"] == [{"said": TEXT * 10}]
    assert sorted(server.directory.rglob("*")) == before
    assert worker.popen.poll() is None
