"""Reads a model's weights into the page cache during imports; from a cold disk, reading and importing take seconds."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import psutil

from builder import layout
from engine.config.environment import Variable
from engine.config.vllm_flags import CONFIG_FILE, EXTRA_ARGS

# Values of vLLM's `--load-format` whose loaders read past the page cache, with threads of their own, or not at all:
# next to them, reading ahead would read everything twice.
OWN_READERS = (
    "dummy",
    "fastsafetensors",
    "instanttensor",
    "ipc_cache",
    "modelexpress",
    "runai_streamer",
    "tensorizer",
)
# The option's value on a command line or in a file of flags, but not in a comment.
_LOAD_FORMAT = re.compile(r"""^(?:[^#\n]*\s)?-{0,2}load[-_]format(?:\s*[:=]\s*|\s+)["']?(\w+)""", re.MULTILINE)
_BUFFER_BYTES = 1 << 20

_log = logging.getLogger(__name__)


def has_own_reader(variables: Mapping[str, Variable]) -> bool:
    """Return whether the variables, or the file of flags, name such a loader; vLLM's parser is not imported yet."""
    file = ""
    if CONFIG_FILE in variables:
        with contextlib.suppress(OSError, ValueError):  # What is wrong with the file is reported later.
            file = Path(variables[CONFIG_FILE].value).read_text(encoding="utf-8")
    found = _LOAD_FORMAT.findall(file)
    # Later sources win (`engine.config.vllm_flags`).
    if "LOAD_FORMAT" in variables:
        found.append(variables["LOAD_FORMAT"].value)
    if EXTRA_ARGS in variables:
        found += _LOAD_FORMAT.findall(variables[EXTRA_ARGS].value)
    return bool(found) and found[-1] in OWN_READERS


def start(directory: Path) -> None:
    """Start a thread that reads the directory's weights; errors are ignored.

    Weights that are larger than half of the available memory are skipped: they would evict each other from the cache.
    """
    sizes: dict[Path, int] = {}
    with contextlib.suppress(OSError):  # No permission to read the directory
        names = [file.name for file in directory.iterdir()]
        for file in sorted(directory / name for name in layout.required_files(names) if layout.is_weights(name)):
            with contextlib.suppress(OSError):  # A broken link
                sizes[file] = file.stat().st_size
    files, size_bytes = list(sizes), sum(sizes.values())
    if size_bytes < psutil.virtual_memory().available / 2:
        threading.Thread(target=_read, args=(files,), name="prefetch weights", daemon=True).start()


def _read(files: list[Path]) -> None:
    # Not `posix_fadvise`: Linux limits its read-ahead to a fraction of a megabyte.
    buffer = bytearray(_BUFFER_BYTES)
    for file in files:
        try:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
        except OSError as error:
            _log.debug("%s cannot be prefetched: %s", file, error)
