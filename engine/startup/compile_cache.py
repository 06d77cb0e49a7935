"""Sets the directory of vLLM's compiled code, and logs whether a start could use what an earlier one compiled.

It is on the network volume if there is one, which outlives the worker and is shared by all workers; otherwise it is
vLLM's default, which may be part of the image or of a worker that is only stopped. vLLM decides what is valid: the key
of an entry is a hash of the model's configuration, the flags, vLLM's code and version, the compiler and the device.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from engine.backend import compat

_ROOT = "VLLM_CACHE_ROOT"

_log = logging.getLogger(__name__)


def configure(volume: Path) -> None:
    """Let vLLM keep compiled code on the volume, if it is writable and the user has set no other directory."""
    if not os.environ.get(_ROOT):
        os.environ.pop(_ROOT, None)  # For vLLM, an empty value is the working directory.
    if _ROOT not in os.environ and os.access(volume, os.W_OK):
        os.environ[_ROOT] = str(volume / "vllm-cache")


def log_usage(lines: str) -> None:
    """Log whether the start could use compiled code; nothing if the model is not compiled.

    Args:
        lines: the log of the engine's processes.
    """
    root = os.environ.get(_ROOT) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vllm")  # noqa: PTH118
    if error := compat.COMPILED_CODE_NOT_LOADED.search(lines):
        _log.warning("Compile cache %s: not used, as vLLM cannot load it: %s", root, error[1])
    elif compat.COMPILED.search(lines):
        _log.info("Compile cache %s: empty for this model, flags and vLLM version; the next start can use it", root)
    elif compat.COMPILED_CODE_LOADED.search(lines):
        _log.info("Compile cache %s: used", root)
