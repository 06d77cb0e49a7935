"""What a container's health check is told."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from engine import health


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(health, "FILE", tmp_path / "alive")
    monkeypatch.setattr(health, "_BEAT_S", 0.01)
    return tmp_path / "alive"


def test_a_worker_that_has_not_started_is_not_well(file: Path) -> None:
    assert not file.exists()
    assert health.main() == 1


def test_a_worker_is_well_while_its_loop_turns(file: Path) -> None:
    async def turn() -> None:
        beating = asyncio.create_task(health.beat(lambda: None))
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
    asyncio.run(health.beat(lambda: "its process is dead"))
    assert not file.exists()
