"""Where vLLM keeps what it compiles, and whether a start could use it.

On the network volume if there is one, for it outlives the worker and other workers find it; else where vLLM keeps it by
itself, which an image, or a worker that is merely stopped, may hold. What is valid is vLLM's own affair: each entry is
named by a hash over the model's configuration, the flags, vLLM's code and version, the compiler and the device.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

_ROOT = "VLLM_CACHE_ROOT"
# What vLLM 0.32 logs as it uses what it has compiled earlier, and as it compiles.
_USED = re.compile(r"Directly load (?:AOT compilation|the compiled graph)")
_FAILED = re.compile(r"Compiling model again due to a load failure from \S+, reason: (.*)")
_MADE = re.compile(r"(?:Compiling a graph|saved AOT compiled function)")

_log = logging.getLogger(__name__)


def choose(volume: Path) -> None:
    """Let vLLM keep it on the volume, unless the user has said where, or nothing can be kept there."""
    if _ROOT not in os.environ and volume.is_dir() and os.access(volume, os.W_OK):
        os.environ[_ROOT] = str(volume / "vllm-cache")


def tell(lines: str) -> None:
    """Say whether the start could use what an earlier one compiled; nothing if it compiled nothing.

    Args:
        lines: what the engine's processes logged.
    """
    root = os.environ.get(_ROOT) or "~/.cache/vllm"
    if failed := _FAILED.search(lines):
        _log.warning("Compile cache %s: not used, as vLLM cannot load what is there: %s", root, failed[1])
    elif _MADE.search(lines):
        _log.info("Compile cache %s: nothing for this model, these flags and this vLLM; the next start finds it", root)
    elif _USED.search(lines):
        _log.info("Compile cache %s: used", root)
