"""Reads a model's weights into the file cache while Python imports: from a cold disk both take seconds."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import psutil

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")

_log = logging.getLogger(__name__)


def begin(directory: Path) -> None:
    """Ask the system to read the directory's weights, and go on.

    Nothing is held in this process, and nothing fails if it cannot be done. Weights that would push out of the cache
    what has just been read are left alone.
    """
    files = sorted(file for pattern in _WEIGHTS for file in directory.glob(pattern))
    size_bytes = sum(file.stat().st_size for file in files)
    if hasattr(os, "posix_fadvise") and size_bytes < psutil.virtual_memory().available / 2:
        threading.Thread(target=_read, args=(files,), name="read ahead", daemon=True).start()


def _read(files: list[Path]) -> None:
    for file in files:
        try:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
        except OSError as error:
            _log.debug("%s cannot be read ahead: %s", file, error)
