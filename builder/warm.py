"""The `warm` command: makes the caches of compiled code, by starting the worker once, and packs them for an image."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from builder import cache_file
from builder.console import log
from builder.errors import WorkerError
from builder.layout import compiled_dir

STDOUT = "-"
# Sampling as most clients use it, so that its kernels are compiled too.
JOB = json.dumps(
    {
        "input": {
            "openai_route": "/v1/completions",
            "openai_input": {"prompt": "Hello", "max_tokens": 16, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
        }
    }
)
_ROOT = Path(__file__).resolve().parents[1]
_HANDLER = _ROOT / "handler.py"
# Prints the name of the worker's own directory, next to those of other versions and GPUs.
_KEY = ("-m", "engine.startup.caches")


def warm(file: str | None = None, job: str = JOB, environment: Mapping[str, str] = os.environ) -> Path:
    """Start the worker, which compiles what is not in its directory of caches yet, and run one job.

    Args:
        file: an archive to pack the directory into, or `-` for stdout; by default, nothing is packed.
        job: JSON of the job.
        environment: the worker's variables; `COMPILE_CACHE_DIR` says where its caches are.

    Returns:
        The directory of caches.

    Raises:
        WorkerError: the worker did not start, the job failed, or there is nothing to pack. An archive that was there
            before stays.
        OSError: the archive cannot be written; the same.
    """
    directory = Path(environment.get("COMPILE_CACHE_DIR") or compiled_dir(environment)).absolute()
    log(f"starting the worker, which compiles into {directory}: this may take minutes")
    done = subprocess.run(
        [sys.executable, str(_HANDLER), "--test_input", job],
        env={**environment, "COMPILE_CACHE_DIR": str(directory)},
        stdout=sys.stderr,  # The builder's own stdout may be the archive.
        check=False,
    )
    if done.returncode:
        raise WorkerError(f"the worker ended with {done.returncode}, see above: nothing was packed")
    if file is not None:
        _pack(directory, file)
    return directory


def _pack(directory: Path, file: str) -> None:
    """Pack what the worker that has just run has in the directory."""
    key = subprocess.run(
        [sys.executable, *_KEY], cwd=_ROOT, stdout=subprocess.PIPE, check=True, text=True
    ).stdout.strip()
    names = [f"{key}/{name}" for name in cache_file.files_below(directory / key)]
    if not names:
        raise WorkerError(
            f"the worker has compiled nothing into {directory / key}: nothing was packed. Unset ENFORCE_EAGER, and "
            "variables such as VLLM_CACHE_ROOT that name other places"
        )
    if file != STDOUT:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=None if file == STDOUT else Path(file).parent, prefix=".") as temporary:
        archive = Path(temporary) / "compiled.tar"
        count = cache_file.pack(directory, archive, names)
        log(f"packed {count} files, {archive.stat().st_size / 1e6:.1f} MB")
        if file != STDOUT:
            archive.replace(file)
            return
        with archive.open("rb") as content:
            shutil.copyfileobj(content, sys.stdout.buffer)
