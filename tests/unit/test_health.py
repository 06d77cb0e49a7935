"""The health check of a container."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from engine import health


@pytest.fixture
def heartbeat_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(health, "HEARTBEAT_INTERVAL_S", 0.01)
    monkeypatch.setenv("RUNPOD_POD_ID", "abc/../1")
    return tmp_path / f"vllm-serverless-{os.getuid()}" / "abc____1.alive"


def test_a_worker_that_has_not_started_is_unhealthy(heartbeat_file: Path) -> None:
    assert not heartbeat_file.exists()
    assert health.main() == 1


def test_a_worker_is_healthy_while_its_event_loop_runs(heartbeat_file: Path) -> None:
    async def run_for_a_while() -> None:
        beating = asyncio.create_task(health.heartbeat(lambda: None))
        await asyncio.sleep(0.05)
        os.utime(heartbeat_file, (0, 0))
        await asyncio.sleep(0.05)
        beating.cancel()

    asyncio.run(run_for_a_while())
    assert health.main() == 0
    long_ago = time.time() - 31
    os.utime(heartbeat_file, (long_ago, long_ago))
    assert health.main() == 1


def test_a_worker_that_was_frozen_for_hours_is_healthy_when_it_is_thawed(
    heartbeat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check may run before the worker's event loop does."""
    heartbeat_file.parent.mkdir()
    heartbeat_file.touch()
    os.utime(heartbeat_file, (0, 0))
    monkeypatch.setattr(time, "sleep", lambda _: heartbeat_file.touch())

    assert health.main() == 0


def test_a_worker_with_a_dead_engine_is_unhealthy(heartbeat_file: Path) -> None:
    asyncio.run(health.heartbeat(lambda: "its process is dead"))
    assert not heartbeat_file.exists()


def test_the_health_of_another_worker_on_the_machine_does_not_count(
    heartbeat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat_file.parent.mkdir()
    heartbeat_file.touch()
    monkeypatch.setenv("RUNPOD_POD_ID", "another")

    assert health.main() == 1


async def send_heartbeats() -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(health.heartbeat(lambda: None), 0.1)


def test_a_heartbeat_file_that_cannot_be_written_is_logged_once(
    heartbeat_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another user may own it, or the disk may be full."""
    heartbeat_file.parent.write_text("a file instead of the directory")

    asyncio.run(send_heartbeats())

    assert len(caplog.records) == 1
    assert str(heartbeat_file) in caplog.text
