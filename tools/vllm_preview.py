"""Prepares another vLLM's Python sources over the CPU kernels that are installed, to see what it has moved.

    python -m tools.vllm_preview DIRECTORY [VERSION]

vLLM's CUDA build is published first, and needs a GPU; nearly all that this worker uses of vLLM is Python, the same in
both builds. With the directory first in `PYTHONPATH` and `VLLM_TARGET_DEVICE=cpu`, tests and the worker run on it. A
crash or a wrong answer may be due to kernels that have changed: `make upgrade` decides once there is a CPU build.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_REQUIREMENT = re.compile(r"^Requires-Dist: (?P<requirement>(?P<name>[\w.-]+)[^;\n]*)(?P<marker>;.*)?$", re.MULTILINE)


def prepare(directory: Path, version: str | None = None) -> None:
    """Fill a directory with vLLM's sources, the installed kernels, and packages that this vLLM is the first to require.

    Args:
        directory: is replaced if it exists.
        version: of vLLM; the newest without it.

    Raises:
        subprocess.CalledProcessError: pip cannot download it, and has said why.
        RuntimeError: no vLLM is installed.
    """
    installed = find_spec("vllm")
    if installed is None or not installed.submodule_search_locations:
        raise RuntimeError("vLLM is not installed")
    if directory.exists() and not any(directory.glob("vllm-*.dist-info")):
        raise RuntimeError(f"{directory} is not an earlier preview: remove it, or give another directory")
    kernels = Path(installed.submodule_search_locations[0])
    shutil.rmtree(directory, ignore_errors=True)
    with tempfile.TemporaryDirectory() as downloaded:
        _pip("download", "--no-deps", "--dest", downloaded, f"vllm=={version}" if version else "vllm")
        (wheel,) = Path(downloaded).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory, [name for name in archive.namelist() if not _is_binary(name)])
    for library in kernels.rglob("*.so"):
        target = directory / "vllm" / library.relative_to(kernels)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    (metadata,) = directory.glob("vllm-*.dist-info/METADATA")
    locked = (_ROOT / "requirements/gpu.lock").read_text(encoding="utf-8")
    if new := new_requirements(metadata.read_text(encoding="utf-8"), locked):
        _pip("install", "--no-deps", "--target", str(directory), *new)


def new_requirements(metadata: str, locked: str) -> list[str]:
    """Return what a vLLM requires on every machine and the lock of the present one does not have.

    Args:
        metadata: of the new vLLM's wheel.
        locked: a lock file with the requirements of the present one.
    """
    known = {_normalized(line.partition("==")[0]) for line in locked.splitlines() if "==" in line}
    return [
        match["requirement"]
        for match in _REQUIREMENT.finditer(metadata)
        if match["marker"] is None and _normalized(match["name"]) not in known
    ]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_binary(name: str) -> bool:
    return ".so" in Path(name).name or name == "vllm/vllm-rs"


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), *(one for one in sys.argv[2:3] if one))
