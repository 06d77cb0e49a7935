"""vLLM's sockets are in a directory of the worker's own, which does not outlive it for long."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.backend.ipc_directory import VARIABLE, IPCDirectory

OTHER_WORKER = """
import os, socket, sys
from engine.backend.ipc_directory import VARIABLE, IPCDirectory
directory = IPCDirectory()
listener = socket.socket(socket.AF_UNIX)
listener.bind(os.environ[VARIABLE] + "/socket")
print(os.environ[VARIABLE], flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a temporary directory of the test's own the system's; not pytest's, whose path is too long for a socket."""
    monkeypatch.delenv(VARIABLE, raising=False)
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setenv("TMPDIR", path)
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)


def bind_socket() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{os.environ[VARIABLE]}/3f8a1e8e-0b1d-4bb0-a9d1-cf3f0c5ae1f5")


@pytest.fixture
def other_worker() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def path_of(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def test_the_sockets_are_the_workers_own_and_go_with_it(temporary: Path) -> None:
    directory = IPCDirectory()
    bind_socket()
    (made,) = temporary.iterdir()
    assert os.environ[VARIABLE] == str(made)
    assert made.stat().st_mode & 0o777 == 0o700

    directory.close()
    directory.close()

    assert list(temporary.iterdir()) == []
    assert VARIABLE not in os.environ


def test_the_users_own_setting_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/run/vllm")

    IPCDirectory().close()

    assert os.environ[VARIABLE] == "/run/vllm"
    assert list(temporary.iterdir()) == []


def test_what_a_killed_worker_has_left_is_removed_by_the_next(
    temporary: Path, other_worker: subprocess.Popen[str]
) -> None:
    left = path_of(other_worker)
    first = IPCDirectory()
    assert (left / "socket").exists(), "of a worker that runs"
    first.close()

    other_worker.send_signal(signal.SIGKILL)
    other_worker.wait()
    assert (left / "socket").exists()
    IPCDirectory().close()

    assert list(temporary.iterdir()) == []


def test_a_directory_that_another_worker_removes_before_it_is_locked_is_made_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkdtemp, list[str]()

    def mkdtemp(prefix: str) -> str:
        made.append(make(prefix=prefix))
        if len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)

    directory = IPCDirectory()

    assert os.environ[VARIABLE] == made[1]
    directory.close()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("unusable", ["x" * 50, "missing/directory"])
def test_where_no_directory_is_possible_vllm_uses_the_temporary_one(
    unusable: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not exist, or its path would be too long for a socket, which may have 107 bytes."""
    path = temporary / unusable
    if "/" not in unusable:
        path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))

    IPCDirectory().close()

    assert VARIABLE not in os.environ
    assert not path.exists() or list(path.iterdir()) == []
