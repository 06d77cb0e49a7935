"""Weights are read ahead, all of them and nothing else, and nothing fails if they cannot be."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine import read_ahead


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that the system is asked to read."""
    names: list[str] = []

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_WILLNEED)
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return names


def begin(directory: Path) -> None:
    """Have it done to the end."""
    read_ahead.begin(directory)
    for thread in threading.enumerate():
        if thread.name == "read ahead":
            thread.join(10)


def test_the_weights_are_read_and_nothing_else(tmp_path: Path, asked: list[str]) -> None:
    for name in ("b.safetensors", "a.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"x")

    begin(tmp_path)

    assert asked == ["a.safetensors", "b.safetensors"]


def test_weights_that_fill_the_memory_are_left_alone(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)

    class Memory:
        available = 200

    def memory() -> Any:
        return Memory

    monkeypatch.setattr(psutil, "virtual_memory", memory)
    begin(tmp_path)

    assert asked == []


def test_what_is_not_there_is_no_error(tmp_path: Path, asked: list[str]) -> None:
    (tmp_path / "gone.safetensors").write_bytes(b"x")
    files = [tmp_path / "gone.safetensors"]
    files[0].unlink()

    read_ahead._read(files)
    begin(tmp_path / "nowhere")

    assert asked == []
