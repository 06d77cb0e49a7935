"""The patterns of log lines and errors match vLLM's sources: an upgrade that moves one is noticed."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.backend import compat

SPEC = importlib.util.find_spec("vllm")
assert SPEC is not None
assert SPEC.origin is not None
VLLM = Path(SPEC.origin).parent

# Where vLLM 0.32 and 0.33 say it.
SOURCES = [
    (compat.WEIGHTS_LOADED.pattern, "model_executor/model_loader/default_loader.py"),
    (r"torch\.compile took ([\d.]+) s in total", "compilation/monitor.py"),
    (r"torch\.compile and initial profiling/warmup run together took ([\d.]+) s in", "compilation/decorators.py"),
    (compat.GRAPHS_CAPTURED.pattern, "v1/worker/gpu_model_runner.py"),
    (compat.GRAPHS_CAPTURED.pattern, "v1/worker/gpu/model_runner.py"),
    (compat.KV_CACHE_SIZED.pattern, "v1/core/kv_cache_utils.py"),
    (compat.ENGINE_INITIALIZED.pattern, "v1/engine/core.py"),
    (r"Directly load AOT compilation", "compilation/decorators.py"),
    (r"Directly load the compiled graph", "compilation/backends.py"),
    (compat.COMPILED_CODE_NOT_LOADED.pattern, "compilation/decorators.py"),
    (r"Compiling a graph", "compilation/backends.py"),
    (r"saved AOT compiled function", "compilation/decorators.py"),
    (compat.MODEL_LEN_EXCEEDS_MEMORY, "v1/core/kv_cache_*.py"),
    (r"To serve at least one request", "v1/core/kv_cache_*.py"),
    (r"No available memory for the cache", "v1/core/kv_cache_*.py"),
    (compat.NOT_ENOUGH_MEMORY, "v1/worker/utils.py"),
    (compat.MODEL_LEN_EXCEEDS_MODEL, "config/model.py"),
]


def texts(source: str) -> Iterator[str]:
    """Yield the texts of a source, with 1 for what is filled in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%\.?\d*[sdf]", "1", node.value)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "1" for part in node.values)


@pytest.mark.parametrize(("pattern", "files"), SOURCES, ids=[pattern for pattern, _ in SOURCES])
def test_a_pattern_matches_what_vllm_says(pattern: str, files: str) -> None:
    found = [text for file in VLLM.glob(files) for text in texts(file.read_text(encoding="utf-8"))]

    assert any(re.search(pattern, text) for text in found), f"vLLM no longer says {pattern!r} in {files}"


def test_each_pattern_is_one_of_those_that_are_looked_for() -> None:
    patterns = [compat.COMPILED_CODE_LOADED.pattern, compat.COMPILED.pattern, compat.NO_KV_CACHE_MEMORY,
                compat.COMPILED_IN.pattern]  # fmt: skip
    samples = ["Directly load AOT compilation", "Directly load the compiled graph", "Compiling a graph",
               "saved AOT compiled function", "To serve at least one request", "No available memory for the cache",
               "leaving none for the KV cache", "torch.compile took 1 s in total",
               "torch.compile and initial profiling/warmup run together took 1 s in total"]  # fmt: skip

    assert all(any(re.search(pattern, sample) for pattern in patterns) for sample in samples)


@pytest.mark.parametrize("name", compat.STARTUP_LOGGERS)
def test_a_logger_is_that_of_a_module(name: str) -> None:
    path = VLLM.parent.joinpath(*name.split(".")).with_suffix(".py")

    assert "init_logger(__name__)" in path.read_text(encoding="utf-8")
