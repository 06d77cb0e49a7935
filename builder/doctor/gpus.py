"""GPUs: the memory that vLLM sees on each model, and the one of this machine."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from builder.errors import SettingError

GIB = 2**30

# The total memory that CUDA reports, in GiB: a few percent less than the nominal size.
GPUS_GIB = {
    "L4": 22.0,
    "A10": 22.0,
    "RTX 3090": 23.6,
    "RTX 4090": 23.5,
    "RTX 5090": 31.3,
    "A40": 44.3,
    "L40": 44.4,
    "L40S": 44.4,
    "A6000": 47.4,
    "RTX 6000 Ada": 47.4,
    "A100-40": 39.4,
    "A100-80": 79.1,
    "H100": 79.1,
    "H200": 139.8,
    "B200": 178.3,
}
# RunPod's A100 has 80 GB. The others are the driver's names.
_ALIASES = {"A100": "A100-80", "H100-80": "H100", "H200-141": "H200"}
# What names add to the model: brands, form factors, kinds of memory.
_IGNORED = re.compile(r"nvidia|geforce|rtx|generation|sxm\d?|pcie|hbm\d\w?|gb\b|[^a-z0-9]")


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
    for spelling, name in {**dict(zip(GPUS_GIB, GPUS_GIB, strict=True)), **_ALIASES}.items():
        if _normalize(text) == _normalize(spelling):
            return Gpu(name, round(GPUS_GIB[name] * GIB))
    try:
        memory_gib = float(re.sub(r"\s*gi?b?$", "", text.strip(), flags=re.IGNORECASE))
    except ValueError:
        memory_gib = 0
    if not 0 < memory_gib < float("inf"):
        raise SettingError(f"unknown GPU {text!r}: give its memory in GiB, or one of {', '.join(GPUS_GIB)}")
    return Gpu(f"a GPU of {memory_gib:g} GiB", round(memory_gib * GIB))


def _normalize(name: str) -> str:
    return _IGNORED.sub("", name.lower())


def local_gpu() -> Gpu | None:
    """Return the first GPU of this machine, as vLLM sees it; None without one."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Gpu(str(properties.name), int(properties.total_memory))
