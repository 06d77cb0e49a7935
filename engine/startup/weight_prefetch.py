"""Reads a model's weights into the page cache while Python imports; from a cold disk both take seconds."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

import psutil

_PIECE_BYTES = 1 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")

_log = logging.getLogger(__name__)


def start(directory: Path) -> None:
    """Start to read the directory's weights in a thread.

    Nothing is kept in this process, and errors are ignored. Weights that are larger than half of the available memory
    are not read: they would evict from the cache what was just read.
    """
    sizes: dict[Path, int] = {}
    with contextlib.suppress(OSError):  # A directory that this user may not read
        for file in sorted(file for pattern in _WEIGHTS for file in directory.glob(pattern)):
            with contextlib.suppress(OSError):  # A link to nothing
                sizes[file] = file.stat().st_size
    files, size_bytes = list(sizes), sum(sizes.values())
    if size_bytes < psutil.virtual_memory().available / 2:
        threading.Thread(target=_read, args=(files,), name="prefetch weights", daemon=True).start()


def _read(files: list[Path]) -> None:
    # Not `posix_fadvise`: Linux limits what it reads to a fraction of a megabyte.
    buffer = bytearray(_PIECE_BYTES)
    for file in files:
        try:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
        except OSError as error:
            _log.debug("%s cannot be prefetched: %s", file, error)
