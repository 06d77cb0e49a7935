"""A directory of the worker's own for the sockets of vLLM's processes, which vLLM leaves behind in the temporary one.

vLLM removes a socket's file only where a process closes the socket, and most of them end otherwise: the worker ends
without a teardown, and its processes by a signal. Here all go with the directory. That of a worker that was killed is
removed by the next one on the machine: the lock on a directory ends with the last process of its worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "VLLM_RPC_BASE_PATH"
_PREFIX = "vllm-ipc-"
# Of a socket's path, by <linux/un.h>; and of what vLLM adds to it: a slash and a UUID.
_MAX_PATH_BYTES = 107
_SOCKET_NAME_BYTES = 37

_log = logging.getLogger(__name__)


class IPCDirectory:
    """Lets vLLM make its sockets in a new directory, until `close`; not if the user has set `VLLM_RPC_BASE_PATH`.

    Where the directory cannot be made, or its path is too long for a socket, vLLM uses the temporary one as ever.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._lock: int | None = None
        if VARIABLE in os.environ:
            return
        try:
            _remove_abandoned()
            self._path, self._lock = _make()
        except OSError as error:
            _log.debug("vLLM's sockets get no directory of their own", exc_info=error)
            return
        if len(os.fsencode(self._path)) + _SOCKET_NAME_BYTES > _MAX_PATH_BYTES:
            self.close()
        else:
            os.environ[VARIABLE] = str(self._path)

    def close(self) -> None:
        """Remove the directory with all sockets. The processes that use them have ended."""
        if self._path is None or self._lock is None:
            return
        os.environ.pop(VARIABLE, None)
        shutil.rmtree(self._path, ignore_errors=True)
        os.close(self._lock)
        self._path = self._lock = None


def _make() -> tuple[Path, int]:
    """Return a new directory that only this user can read, and its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with contextlib.suppress(FileNotFoundError):  # Another worker has found it before it was locked.
            lock = _open(path)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _remove_abandoned() -> None:
    """Remove the directories of this user's workers that have ended."""
    for path in _directories():
        with contextlib.suppress(OSError):
            lock = _open(path)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _directories() -> Iterator[Path]:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                yield path


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
