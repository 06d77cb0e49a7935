"""Runs one worker and sees to it that nothing of it is left behind: `python -I -S launcher.py FD COMMAND...`.

FD is one end of a socket pair whose other end only the emulator has. The launcher writes `pid N` to it, and `exit N`
at the end; when the other end closes, however the emulator came to its end, all that the worker ever started is
killed. SIGTERM is passed to the worker's own process alone, as a container runtime does; SIGKILL goes to all.

A script of its own, on the standard library alone, so that a worker costs one small process and a few milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_NOT_FOUND = 127


def _prctl(option: int, value: int) -> None:
    """Linux only: elsewhere, the worker's process group is all that can be ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _start(command: list[str]) -> int:
    """Start the worker in a process group of its own; return its process id.

    Not in a session: Linux shares the processor out among sessions first, and a worker whose threads spin would starve
    the emulator.
    """
    launcher = os.getpid()
    # A SIGTERM that comes before there is someone to pass it to waits until there is.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        # Should the launcher itself be killed, at least the worker's own process goes with it.
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os.execvp(command[0], command)  # noqa: S606 (the command is the emulator's own setting)
    except OSError as error:
        os.write(2, f"{command[0]} cannot be started: {error.strerror}\n".encode())
    os._exit(_NOT_FOUND)


def _watch(line: socket.socket, worker: int) -> int | None:
    """Wait until the worker ends, or the emulator lets go; return the worker's exit code, None if it still runs."""
    waking, wake = os.pipe()
    for end in (waking, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _send(worker, signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    while True:
        code = _reap(worker)
        if code is not None:
            return code
        readable, _, _ = select.select([line.fileno(), waking], [], [])
        if waking in readable:
            os.read(waking, 4096)
        if line.fileno() in readable and not line.recv(4096):
            return None


def _reap(worker: int) -> int | None:
    """Collect all children that have ended; return the worker's exit code if it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == worker:
            code = os.waitstatus_to_exitcode(status)


def _end_all(worker: int) -> int | None:
    """Kill the worker's group, then whatever else has become a child of ours; return the worker's exit code, if new."""
    _send(-worker, signal.SIGKILL)
    code = None
    while True:
        for child in _children():
            _send(child, signal.SIGKILL)
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == worker:
            code = os.waitstatus_to_exitcode(status)
        elif pid == 0:
            time.sleep(0.005)


def _send(process: int, number: int) -> None:
    """Send a signal to a process, or to the group of a negative number; none is missed that has ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _say(line: socket.socket, message: str) -> None:
    """Tell the emulator; where it is gone, the next look at the line says so."""
    with contextlib.suppress(OSError):
        line.sendall(f"{message}\n".encode())


def _children() -> list[int]:
    """Our children by now: as their subreaper we inherit every process whose parent has ended."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # `pid (name) state ppid ...`: the name may hold anything, so count from its closing bracket.
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # It ended while we looked.
        if int(fields[1]) == os.getpid():
            children.append(int(stat.parent.name))
    return children


def main() -> None:
    """Run the command and report."""
    line = socket.socket(fileno=int(sys.argv[1]))
    line.set_inheritable(False)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    worker = _start(sys.argv[2:])
    _say(line, f"pid {worker}")
    code = _watch(line, worker)
    killed = _end_all(worker)
    _say(line, f"exit {killed if code is None else code}")


if __name__ == "__main__":
    main()
