"""What vLLM compiles is kept where the next worker finds it, and a start says whether it could use it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from engine.startup import compile_cache


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", "x")
    monkeypatch.delenv("VLLM_CACHE_ROOT")


def test_it_is_kept_on_the_volume(tmp_path: Path) -> None:
    compile_cache.configure(tmp_path)

    assert os.environ["VLLM_CACHE_ROOT"] == str(tmp_path / "vllm-cache")


def test_without_a_volume_it_is_kept_where_vllm_keeps_it(tmp_path: Path) -> None:
    compile_cache.configure(tmp_path / "nowhere")

    assert "VLLM_CACHE_ROOT" not in os.environ


def test_what_the_user_says_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/mine")

    compile_cache.configure(tmp_path)

    assert os.environ["VLLM_CACHE_ROOT"] == "/mine"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("Directly load AOT compilation from path /x", ["Compile cache ~/.cache/vllm: used"]),
        ("Directly load the compiled graph(s) for compile range (1, 2) from the cache", ["used"]),
        ("Compiling a graph for compile range (1, 2) takes 9.00 s", ["empty for this model"]),
        ("saved AOT compiled function to /x", ["empty for this model"]),
        (
            "Compiling model again due to a load failure from /x, reason: no attribute 'y'\nsaved AOT compiled",
            ["not used, as vLLM cannot load it: no attribute 'y'"],
        ),
        ("Loading weights took 1.00 s", []),
    ],
)
def test_a_start_says_whether_it_could_use_it(lines: str, told: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        compile_cache.log_usage(lines)

    assert len(caplog.records) == len(told)
    assert all(words in record.getMessage() for words, record in zip(told, caplog.records, strict=True))
