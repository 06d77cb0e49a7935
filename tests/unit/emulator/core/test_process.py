"""Worker processes, with real ones."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from emulator.core.process import WorkerProcess


class RecordingListener:
    """Records the lines of a process, and waits for its exit."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.exited = asyncio.Event()

    def on_log_line(self, line: str) -> None:
        self.lines.append(line)

    def on_exit(self, _code: int) -> None:
        self.exited.set()


async def lines_of(command: Sequence[str], env: Mapping[str, str]) -> list[str]:
    listener = RecordingListener()
    WorkerProcess(command, env, None, listener)
    await asyncio.wait_for(listener.exited.wait(), 20)
    return listener.lines


def test_a_long_line_without_an_end_is_one_line() -> None:
    script = "import time; print('x' * 5000, end='', flush=True); time.sleep(0.2); print('a-secret')"
    lines = asyncio.run(lines_of([sys.executable, "-c", script], os.environ))
    assert lines == ["x" * 5000 + "a-secret"]


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_invalid_environment_is_a_value_error_and_leaks_no_descriptors() -> None:
    async def start() -> None:
        before = open_descriptors()
        with pytest.raises(ValueError, match="environment"):
            WorkerProcess(["true"], {"A=B": "x"}, None, RecordingListener())
        assert open_descriptors() == before

    asyncio.run(start())
