"""Worker processes: started through `launcher.py`, with their log lines captured, and killed with all descendants."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

_LAUNCHER = Path(__file__).with_name("launcher.py")
_READ_BYTES = 65536
# Much longer than what is kept of a line, so that no secret is cut before it is redacted.
_MAX_LINE_BYTES = 65536
# Exit code of a worker whose launcher was killed before it could report one.
_UNKNOWN_EXIT_CODE = -int(signal.SIGKILL)


class Process(Protocol):
    """A worker's process, as a fleet uses it."""

    @property
    def pid(self) -> int | None:
        """Its process id; None while it has none."""

    def terminate(self) -> None:
        """Send SIGTERM to the worker's own process."""

    def kill(self) -> None:
        """Send SIGKILL to the worker's process and all its descendants."""

    def freeze(self) -> None:
        """Send SIGSTOP to the worker's process and all its descendants."""

    def thaw(self) -> None:
        """Let them go on."""


class ProcessListener(Protocol):
    """Is notified of what a process does."""

    def on_log_line(self, line: str) -> None:
        """Handle a line that it wrote."""

    def on_exit(self, code: int) -> None:
        """Handle its exit, after that of all its descendants; the code is negative for signals."""


StartProcess = Callable[[Sequence[str], Mapping[str, str], str | None, ProcessListener], Process]
"""Starts a command with an environment in a directory."""


class WorkerProcess:
    """A command that runs under the launcher; requires a running event loop.

    Args:
        command: the command to run.
        env: its complete environment.
        cwd: its working directory; None: the emulator's.
        listener: is notified of log lines and of the exit.

    Raises:
        OSError: the launcher cannot be started.
        ValueError: the command or the environment is not valid, such as a variable's name with `=` in it.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str | None, listener: ProcessListener
    ) -> None:
        self.pid: int | None = None
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._exit_code: int | None = None
        self._partial_message = b""
        self._partial_line = b""
        control_socket, launcher_socket = socket.socketpair()
        log_fd, launcher_log_fd = os.pipe()
        try:
            # Isolated and without site-packages: the worker's environment must not change what the launcher imports.
            self._launcher = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LAUNCHER), str(launcher_socket.fileno()), *command],
                stdin=subprocess.DEVNULL,
                stdout=launcher_log_fd,
                stderr=launcher_log_fd,
                env=dict(env),
                cwd=cwd,
                pass_fds=[launcher_socket.fileno()],
                process_group=0,
            )
        except (OSError, ValueError):
            control_socket.close()
            os.close(log_fd)
            raise
        finally:
            launcher_socket.close()
            os.close(launcher_log_fd)
        self._control_socket: socket.socket | None = control_socket
        self._log_fd: int | None = log_fd
        control_socket.settimeout(0)
        os.set_blocking(log_fd, False)
        self._loop.add_reader(control_socket, self._read_messages)
        self._loop.add_reader(log_fd, self._read_log)

    def terminate(self) -> None:
        """Send SIGTERM to the worker's own process."""
        if self._control_socket is not None:
            self._launcher.terminate()

    def kill(self) -> None:
        """Kill the worker and all its descendants; `on_exit` follows."""
        if self._control_socket is not None:
            # The launcher takes the end of file for the emulator's exit.
            self._control_socket.shutdown(socket.SHUT_WR)

    def freeze(self) -> None:
        """Stop the worker and all its descendants; they do not notice it."""
        self._signal_tree(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the worker and all its descendants go on: the parents last, as one may wait for its child."""
        self._signal_tree(signal.SIGCONT)

    def _signal_tree(self, number: signal.Signals) -> None:
        """Send a signal to the worker and all its descendants.

        One that was just being started is found by the next search.
        """
        signalled: set[int] = set()
        while self.pid is not None and (missed := _tree(self.pid) - signalled):
            for pid in sorted(missed, reverse=number is signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            signalled |= missed

    def _read_messages(self) -> None:
        """Read the launcher's messages: `pid N`, then `exit N`, then the end of file."""
        if self._control_socket is None:
            return
        try:
            data = self._control_socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._partial_message += data
        *messages, self._partial_message = self._partial_message.split(b"\n")
        for message in messages:
            word, _, number = message.decode().partition(" ")
            if word == "pid":
                self.pid = int(number)
            elif number.lstrip("-").isdecimal():
                self._exit_code = int(number)
        if not data:
            self._loop.remove_reader(self._control_socket)
            self._control_socket.close()
            self._control_socket = None
            # Returns at once: closing the socket is the launcher's last act.
            self._launcher.wait()
            while self._log_fd is not None and self._read_log():
                pass
            self._close_log()
            if self._exit_code is None and self.pid is not None:
                # The launcher was killed. Kill what can still be found: the worker's process group.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            self._listener.on_exit(_UNKNOWN_EXIT_CODE if self._exit_code is None else self._exit_code)

    def _read_log(self) -> bool:
        """Read available log output; return whether there may be more."""
        if self._log_fd is None:
            return False
        try:
            data = os.read(self._log_fd, _READ_BYTES)
        except BlockingIOError:
            return False
        self._partial_line += data
        *lines, partial_line = self._partial_line.split(b"\n")
        self._partial_line = partial_line[:_MAX_LINE_BYTES]
        if not data:
            lines.append(self._partial_line)
        for line in lines:
            text = line[:_MAX_LINE_BYTES].decode(errors="replace").rstrip()
            if text:
                self._listener.on_log_line(format_log_line(text))
        if not data:
            self._close_log()
        return bool(data)

    def _close_log(self) -> None:
        if self._log_fd is not None:
            self._loop.remove_reader(self._log_fd)
            os.close(self._log_fd)
            self._log_fd = None


def _tree(root: int) -> set[int]:
    """Return the ids of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # It exited in the meantime.
            # `pid (name) state ppid ...`: the name may contain anything, so parse after its closing parenthesis.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    tree, found = set[int](), [root]
    while found:
        pid = found.pop()
        tree.add(pid)
        found += children.get(pid, [])
    return tree


def format_log_line(line: str) -> str:
    """Return a log line as plain text: both SDKs write JSON, RunPod's when RUNPOD_ENDPOINT_ID is set."""
    if line.startswith(('{"requestId":', '{"message":')):
        try:
            entry: Any = json.loads(line)
        except ValueError:
            return line
        job_id = entry.get("requestId") or entry.get("requestID")
        job = f"{job_id} | " if job_id else ""
        return f"{str(entry.get('level', '')).ljust(7)}| {job}{entry.get('message', '')}"
    return line


def worker_environment(base_url: str, endpoint: str, worker: str, key: str, ping_interval_ms: int) -> dict[str, str]:
    """Return the variables by which the SDK finds the platform (runpod 1.12.0: `rp_job`, `rp_http`, `rp_ping`).

    The SDK itself replaces `$RUNPOD_POD_ID` with the worker's id, and `$ID` with the worker's or the job's.
    """
    root = f"{base_url}/v2/{endpoint}"
    return {
        "RUNPOD_WEBHOOK_GET_JOB": f"{root}/job-take/$ID?gpu=EMULATED",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{root}/job-done/$RUNPOD_POD_ID/$ID?gpu=EMULATED",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{root}/job-stream/$RUNPOD_POD_ID/$ID?gpu=EMULATED",
        "RUNPOD_WEBHOOK_PING": f"{root}/ping/$RUNPOD_POD_ID",
        "RUNPOD_PING_INTERVAL": str(ping_interval_ms),
        "RUNPOD_AI_API_KEY": key,
        "RUNPOD_ENDPOINT_ID": endpoint,
        "RUNPOD_ENDPOINT_BASE_URL": f"{base_url}/v2",
        "RUNPOD_POD_ID": worker,
        "RUNPOD_POD_HOSTNAME": worker,
        # The SDK's fitness checks are about the platform's machines: a worker exits if it cannot reach the internet, or
        # if its disk is 90 % full. An endpoint's own variables can enable them.
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
        "PYTHONUNBUFFERED": "1",
    }
