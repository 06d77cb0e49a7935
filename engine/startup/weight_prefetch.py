"""Reads a model's weights into the file cache while Python imports: from a cold disk both take seconds."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

import psutil

_PIECE_BYTES = 1 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")

_log = logging.getLogger(__name__)


def begin(directory: Path) -> None:
    """Begin to read the directory's weights, and go on.

    Nothing is kept in this process, and nothing fails if it cannot be done. Weights that would push out of the cache
    what has just been read are left alone.
    """
    sizes: dict[Path, int] = {}
    with contextlib.suppress(OSError):  # A directory that this user may not read
        for file in sorted(file for pattern in _WEIGHTS for file in directory.glob(pattern)):
            with contextlib.suppress(OSError):  # A link to nothing
                sizes[file] = file.stat().st_size
    files, size_bytes = list(sizes), sum(sizes.values())
    if size_bytes < psutil.virtual_memory().available / 2:
        threading.Thread(target=_read, args=(files,), name="read ahead", daemon=True).start()


def _read(files: list[Path]) -> None:
    # Read, not advised: Linux cuts what it is advised to read to a fraction of a megabyte.
    buffer = bytearray(_PIECE_BYTES)
    for file in files:
        try:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
        except OSError as error:
            _log.debug("%s cannot be read ahead: %s", file, error)
