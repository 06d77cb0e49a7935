"""Worker processes, with real ones."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from emulator.core.process import WorkerProcess
from tests.integration.emulator.conftest import eventually


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


_CHILD = """
import os, time
os.setsid()
print(os.getpid(), flush=True)
while True:
    time.sleep(9)
"""
_TREE = f"""
import os, subprocess, sys, time
print(os.getpid(), flush=True)
subprocess.run([sys.executable, "-c", {_CHILD!r}])
"""


def state_of(pid: int) -> str:
    """Return a process's state, as proc_pid_stat names it: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_is_frozen_thawed_and_killed_with_its_descendants() -> None:
    """One of them has a session of its own."""

    async def check() -> list[int]:
        listener = RecordingListener()
        process = WorkerProcess([sys.executable, "-c", _TREE], os.environ, None, listener)
        try:
            async with asyncio.timeout(20):
                while len(listener.lines) < 2:  # noqa: ASYNC110 (it is another process that writes them)
                    await asyncio.sleep(0.01)
            pids = [int(line) for line in listener.lines]
            process.freeze()
            eventually(lambda: [state_of(pid) for pid in pids] == ["T", "T"])
            process.thaw()
            eventually(lambda: "T" not in [state_of(pid) for pid in pids])
            process.freeze()
        finally:
            process.kill()
            await asyncio.wait_for(listener.exited.wait(), 20)
        return pids

    assert not any(Path(f"/proc/{pid}").exists() for pid in asyncio.run(check()))
