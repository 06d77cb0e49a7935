"""Run one worker and leave no process of it behind: `python -I -S launcher.py FD COMMAND...`.

FD is one end of a socket pair whose other end only the emulator has. The launcher writes `pid N` to it, and `exit N` at
the end. When the other end is closed, however the emulator exited, the launcher kills all descendants of the worker.
SIGTERM is forwarded to the worker's own process only, as a container runtime does; SIGKILL goes to all.

A separate script with only the standard library, so that a worker costs one small process and a few milliseconds.
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
_COMMAND_NOT_FOUND = 127


def _prctl(option: int, value: int) -> None:
    """Call prctl on Linux; on other systems, only the worker's process group can be killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _start(command: list[str]) -> int:
    """Start the worker in a process group of its own; return its process id.

    Not in a session: Linux shares the CPU between sessions first, and a worker whose threads spin would starve the
    emulator.
    """
    launcher = os.getpid()
    # A SIGTERM that arrives before there is a process to forward it to stays pending.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        # If the launcher itself is killed, at least the worker's own process is too.
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # The launcher may have exited before prctl took effect.
        if os.getppid() != launcher:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os.execvp(command[0], command)  # noqa: S606 (the command is the emulator's own setting)
    except OSError as error:
        os.write(2, f"{command[0]} cannot be started: {error.strerror}\n".encode())
    os._exit(_COMMAND_NOT_FOUND)


def _wait(control_socket: socket.socket, worker: int) -> int | None:
    """Wait until the worker exits or the socket is closed; return the worker's exit code, None if it still runs."""
    wakeup_reader, wakeup_writer = os.pipe()
    for end in (wakeup_reader, wakeup_writer):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _send_signal(worker, signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    while True:
        code = _reap(worker)
        if code is not None:
            return code
        readable, _, _ = select.select([control_socket.fileno(), wakeup_reader], [], [])
        if wakeup_reader in readable:
            os.read(wakeup_reader, 4096)
        if control_socket.fileno() in readable and not control_socket.recv(4096):
            return None


def _reap(worker: int) -> int | None:
    """Reap all children that have exited; return the worker's exit code if it is one of them."""
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


def _kill_all(worker: int) -> int | None:
    """Kill the worker's process group, then all other children; return the worker's exit code if it still ran."""
    _send_signal(-worker, signal.SIGKILL)
    code = None
    while True:
        for child in _children():
            _send_signal(child, signal.SIGKILL)
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == worker:
            code = os.waitstatus_to_exitcode(status)
        elif pid == 0:
            time.sleep(0.005)


def _send_signal(process: int, number: int) -> None:
    """Send a signal to a process, or to a process group if negative; ignore one that has exited."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _report(control_socket: socket.socket, message: str) -> None:
    """Send a message to the emulator; if that has exited, the next read of the socket detects it."""
    with contextlib.suppress(OSError):
        control_socket.sendall(f"{message}\n".encode())


def _children() -> list[int]:
    """Return the current children: a subreaper adopts every descendant whose parent has exited."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # `pid (name) state ppid ...`: the name may contain anything, so parse after its closing parenthesis.
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # It exited in the meantime.
        if int(fields[1]) == os.getpid():
            children.append(int(stat.parent.name))
    return children


def main() -> None:
    """Run the command and report its exit code."""
    control_socket = socket.socket(fileno=int(sys.argv[1]))
    control_socket.set_inheritable(False)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    worker = _start(sys.argv[2:])
    _report(control_socket, f"pid {worker}")
    code = _wait(control_socket, worker)
    code_if_killed = _kill_all(worker)
    _report(control_socket, f"exit {code_if_killed if code is None else code}")


if __name__ == "__main__":
    main()
