"""Weights are read ahead, all of them and nothing else, and nothing fails if they cannot be."""

from __future__ import annotations

import importlib.util
import io
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.config.environment import Variable
from engine.startup import weight_prefetch


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read, with how much of them."""
    read: list[str] = []
    open_file = Path.open

    class Counted(io.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            count = super().readinto(buffer) or 0
            read.append(f"{Path(str(self.name)).name} {count}")
            return count

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        return Counted(path) if mode == "rb" else open_file(path, mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(weight_prefetch, "_BUFFER_BYTES", 2)
    return read


def begin(directory: Path) -> None:
    """Have it done to the end."""
    weight_prefetch.start(directory)
    for thread in threading.enumerate():
        if thread.name == "prefetch weights":
            thread.join(10)


def test_the_weights_are_read_and_nothing_else(tmp_path: Path, asked: list[str]) -> None:
    for name in ("b.safetensors", "a.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"xyz")

    begin(tmp_path)

    assert asked == [f"{name}.safetensors {count}" for name in "ab" for count in (2, 1, 0)]


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

    weight_prefetch._read(files)
    begin(tmp_path / "nowhere")

    assert asked == []


def test_a_link_to_nothing_is_passed_over(tmp_path: Path, asked: list[str]) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.safetensors").write_bytes(b"x")

    begin(tmp_path)

    assert asked == ["b.safetensors 1", "b.safetensors 0"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"LOAD_FORMAT": "safetensors"}, False),
        ({"LOAD_FORMAT": "fastsafetensors"}, True),
        ({"VLLM_EXTRA_ARGS": "--load-format runai_streamer"}, True),
        ({"VLLM_EXTRA_ARGS": "--seed 1 --load_format='dummy' --max-num-seqs=4"}, True),
        ({"VLLM_EXTRA_ARGS": "--served-model-name dummy-8b"}, False),
        ({"VLLM_EXTRA_ARGS": "--load-format auto --served-model-name dummy"}, False),
        ({"LOAD_FORMAT": "dummy", "VLLM_EXTRA_ARGS": "--load-format auto"}, False),
        ({"LOAD_FORMAT": "auto", "VLLM_CONFIG_FILE": "file"}, False),
        ({"VLLM_CONFIG_FILE": "other"}, False),
        ({"VLLM_CONFIG_FILE": "nowhere"}, False),
        ({"VLLM_CONFIG_FILE": "file"}, True),
    ],
)
def test_a_loader_that_reads_by_itself_is_known_before_vllm_is(
    variables: dict[str, str], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Next to it, all weights would be read twice."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("seed: 1\nload-format: instanttensor\nmodel: a\n")
    (tmp_path / "other").write_text("served-model-name: dummy\n# load-format: dummy\n")

    found = weight_prefetch.has_own_reader({name: Variable(text, "environment") for name, text in variables.items()})

    assert found == expected


def test_the_loaders_are_vllms() -> None:
    """With the name of a loader of vLLM that was renamed, reading ahead would begin again unnoticed."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("model_executor").joinpath("model_loader/__init__.py").read_text()

    assert [name for name in weight_prefetch.OWN_READERS if f'"{name}"' not in source] == []
