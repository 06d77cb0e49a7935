"""GPUs: the memory that vLLM sees on each model, and the one of this machine."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from builder.errors import SettingError

GIB = 2**30

# The total memory that CUDA reports, in GiB: some percent less than the nominal size.
GPUS_GIB = {
    "L4": 22.0,
    "A10": 22.0,
    "RTX 3090": 23.6,
    "RTX 4090": 23.5,
    "RTX 5090": 31.3,
    "A40": 44.3,
    "L40S": 44.4,
    "A6000": 47.4,
    "A100-40": 39.4,
    "A100-80": 79.1,
    "H100": 79.1,
    "H200": 139.8,
    "B200": 178.3,
}


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, and the total memory that CUDA reports."""

    name: str
    memory_bytes: int


def find_gpu(text: str) -> Gpu:
    """Return the GPU for a name in the table, in any spelling, or for a memory size in GiB.

    Raises:
        SettingError: the text is neither.
    """
    for name, gib in GPUS_GIB.items():
        if _normalize(text) == _normalize(name):
            return Gpu(name, round(gib * GIB))
    try:
        memory_gib = float(re.sub(r"\s*gi?b?$", "", text.strip(), flags=re.IGNORECASE))
    except ValueError:
        memory_gib = 0
    if not 0 < memory_gib < float("inf"):
        raise SettingError(f"unknown GPU {text!r}: give its memory in GiB, or one of {', '.join(GPUS_GIB)}")
    return Gpu(f"a GPU of {memory_gib:g} GiB", round(memory_gib * GIB))


def _normalize(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|gb$|[^a-z0-9]", "", name.lower())


def local_gpu() -> Gpu | None:
    """Return the first GPU of this machine, as vLLM sees it; None without one."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Gpu(str(properties.name), int(properties.total_memory))
