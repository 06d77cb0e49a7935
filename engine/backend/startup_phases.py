"""Reads from the captured log of vLLM's processes how long each part of the engine's start took, and from which cache.

    weights   reading the weights
    compile   torch.compile, or loading what it has compiled before
    profile   a forward pass with dummy inputs, and on a GPU a few graph captures, to see how much memory is left
    capture   CUDA graph capture, which vLLM reports in whole seconds
    kernels   the KV cache, and compiling and tuning of kernels other than torch.compile's

The last four are all of vLLM's "init engine" and do not overlap. A part that was not logged took 0 s. With several
GPUs, processes work in parallel: the slowest counts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from enum import StrEnum

from engine.backend import compat
from engine.backend.startup_logs import Line


class CompileCache(StrEnum):
    """What a start found of compiled code (`torch.compile`)."""

    USED = "used"
    EMPTY = "empty"
    UNLOADABLE = "unloadable"


def phases(lines: Sequence[Line]) -> dict[str, float]:
    """Return the phases in seconds, in order."""
    weights_s = _slowest(compat.WEIGHTS_LOADED, lines)
    compile_s = _slowest(compat.COMPILED_IN, lines)
    capture_s = _slowest(compat.GRAPHS_CAPTURED, lines)
    ready = next((line for line in reversed(lines) if compat.ENGINE_INITIALIZED.search(line.message)), None)
    total_s = _seconds(compat.ENGINE_INITIALIZED, ready) if ready else 0.0
    profile_s = total_s - capture_s
    if ready is not None and (
        sized := next((line for line in reversed(lines) if compat.KV_CACHE_SIZED.search(line.message)), None)
    ):
        profile_s = total_s - (ready.time_s - sized.time_s)
    # Whatever is logged inconsistently: nothing is negative, and the sum is the total.
    rest_s = total_s
    parts = {}
    for name, seconds in (("compile", compile_s), ("profile", profile_s - compile_s), ("capture", capture_s)):
        parts[name] = min(max(seconds, 0.0), rest_s)
        rest_s -= parts[name]
    return {"weights": weights_s, **parts, "kernels": rest_s}


def compile_cache(lines: Sequence[Line]) -> CompileCache | None:
    """Return what the start found of compiled code; None if the model is not compiled."""
    for pattern, found in (
        (compat.COMPILED_CODE_NOT_LOADED, CompileCache.UNLOADABLE),
        (compat.COMPILED, CompileCache.EMPTY),
        (compat.COMPILED_CODE_LOADED, CompileCache.USED),
    ):
        if any(pattern.search(line.message) for line in lines):
            return found
    return None


def _slowest(pattern: re.Pattern[str], lines: Sequence[Line]) -> float:
    """Return the seconds that the lines report, added up for each process; those of the slowest process."""
    totals: dict[int, float] = defaultdict(float)
    for line in lines:
        totals[line.process] += _seconds(pattern, line)
    return max(totals.values(), default=0.0)


def _seconds(pattern: re.Pattern[str], line: Line) -> float:
    found = pattern.search(line.message)
    return float(found[1]) if found else 0.0
