"""Reads a model's weights into the page cache during imports; from a cold disk, reading and importing take seconds."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

import psutil

from builder import layout

_BUFFER_BYTES = 1 << 20

_log = logging.getLogger(__name__)


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
