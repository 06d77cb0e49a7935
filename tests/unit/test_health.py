"""What a container's health check is told."""

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
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(health, "HEARTBEAT_INTERVAL_S", 0.01)
    monkeypatch.setenv("RUNPOD_POD_ID", "abc/../1")
    return tmp_path / f"vllm-serverless-{os.getuid()}" / "abc____1.alive"


def test_a_worker_that_has_not_started_is_not_well(file: Path) -> None:
    assert not file.exists()
    assert health.main() == 1


def test_a_worker_is_well_while_its_loop_turns(file: Path) -> None:
    async def turn() -> None:
        beating = asyncio.create_task(health.heartbeat(lambda: None))
        await asyncio.sleep(0.05)
        os.utime(file, (0, 0))
        await asyncio.sleep(0.05)
        beating.cancel()

    asyncio.run(turn())
    assert health.main() == 0
    long_ago = time.time() - 31
    os.utime(file, (long_ago, long_ago))
    assert health.main() == 1


def test_a_worker_with_a_dead_engine_is_not_well(file: Path) -> None:
    asyncio.run(health.heartbeat(lambda: "its process is dead"))
    assert not file.exists()


def test_workers_of_one_machine_do_not_speak_for_each_other(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.mkdir()
    file.touch()
    monkeypatch.setenv("RUNPOD_POD_ID", "another")

    assert health.main() == 1


async def beaten_for_a_while() -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(health.heartbeat(lambda: None), 0.1)


def test_a_file_that_cannot_be_written_is_told_once_and_ends_nothing(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where another user has made it, or the disk is full."""
    file.parent.write_text("a file in the place of the directory")

    asyncio.run(beaten_for_a_while())

    assert len(caplog.records) == 1
    assert str(file) in caplog.text
