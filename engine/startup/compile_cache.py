"""Sets where vLLM keeps compiled code, and logs whether a start could use it.

It is kept on the network volume if there is one, as that outlives the worker and is shared by others; else in vLLM's
own directory, which may be in the image or in a worker that is only stopped. vLLM decides what is valid: each entry is
named by a hash over the model's configuration, the flags, vLLM's code and version, the compiler and the device.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

_ROOT = "VLLM_CACHE_ROOT"
# What vLLM 0.32 logs when it uses code that was compiled earlier, and when it compiles.
_USED = re.compile(r"Directly load (?:AOT compilation|the compiled graph)")
_FAILED = re.compile(r"Compiling model again due to a load failure from \S+, reason: (.*)")
_MADE = re.compile(r"(?:Compiling a graph|saved AOT compiled function)")

_log = logging.getLogger(__name__)


def configure(volume: Path) -> None:
    """Let vLLM keep compiled code on the volume, unless the user has set a directory, or the volume is not writable."""
    if _ROOT not in os.environ and volume.is_dir() and os.access(volume, os.W_OK):
        os.environ[_ROOT] = str(volume / "vllm-cache")


def log_usage(lines: str) -> None:
    """Log whether the start could use what an earlier one compiled; nothing if the model is not compiled.

    Args:
        lines: what the engine's processes logged.
    """
    root = os.environ.get(_ROOT) or "~/.cache/vllm"
    if failed := _FAILED.search(lines):
        _log.warning("Compile cache %s: not used, as vLLM cannot load it: %s", root, failed[1])
    elif _MADE.search(lines):
        _log.info("Compile cache %s: empty for this model, these flags and this vLLM; the next start can use it", root)
    elif _USED.search(lines):
        _log.info("Compile cache %s: used", root)
