"""A lock between processes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from builder.console import log

_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


@contextmanager
def process_lock(path: Path, activity: str) -> Iterator[None]:
    """Hold the lock file; log when another process has it, or when the disk does not support locks.

    Args:
        path: of the lock file.
        activity: what the holder is doing, for the log.
    """
    # No soft lock (a file that merely exists): it would outlive a process that is killed.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(f"another process is {activity}: waiting for it")
        lock.acquire()
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        log(f"the disk of {path.parent} does not support locks: only one process at a time may be {activity}")
    try:
        yield
    finally:
        lock.release()
