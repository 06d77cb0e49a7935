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
from builder.tiny_model.cache import cache_root

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
_HANDLER = Path(__file__).resolve().parents[1] / "handler.py"


def warm(file: str | None = None, job: str = JOB, environment: Mapping[str, str] = os.environ) -> Path:
    """Start the worker, which compiles what is not in its directory of caches yet, and run one job.

    Args:
        file: an archive to pack the directory into, or `-` for stdout; by default, nothing is packed.
        job: JSON of the job.
        environment: the worker's variables; `COMPILE_CACHE_DIR` says where its caches are.

    Returns:
        The directory of caches.

    Raises:
        WorkerError: the worker did not start, or the job failed. Nothing is packed then.
        OSError: the archive cannot be written.
    """
    directory = Path(environment.get("COMPILE_CACHE_DIR") or cache_root(environment) / "compiled")
    log(f"starting the worker, which compiles into {directory}: this may take minutes")
    done = subprocess.run(
        [sys.executable, str(_HANDLER), "--test_input", job],
        env={**environment, "COMPILE_CACHE_DIR": str(directory)},
        stdout=sys.stderr,  # The builder's own stdout may be the archive.
        check=False,
    )
    if done.returncode:
        raise WorkerError(f"the worker ended with {done.returncode}, see above: nothing was packed")
    if file == STDOUT:
        with tempfile.TemporaryDirectory() as temporary:
            archive = Path(temporary) / "compiled.tar"
            _pack(directory, archive)
            with archive.open("rb") as content:
                shutil.copyfileobj(content, sys.stdout.buffer)
    elif file is not None:
        Path(file).unlink(missing_ok=True)
        _pack(directory, Path(file))
    return directory


def _pack(directory: Path, archive: Path) -> None:
    count = cache_file.pack(directory, archive)
    archive.with_name(f"{archive.name}.lock").unlink(missing_ok=True)  # It is for archives that workers share.
    log(f"packed {count} files, {archive.stat().st_size / 1e6:.1f} MB")
