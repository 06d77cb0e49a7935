"""Real worker processes: started through `launcher.py`, their log lines kept, ended without a trace."""

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
_LINE_BYTES = 4000
# What a child returns that was ended by a signal we did not see the end of.
_UNKNOWN_EXIT = -int(signal.SIGKILL)


class Process(Protocol):
    """A worker's process, as a fleet sees it."""

    pid: int | None

    def terminate(self) -> None:
        """Ask it to end (SIGTERM to the worker's own process)."""

    def kill(self) -> None:
        """End it and all that it started (SIGKILL)."""


class ProcessListener(Protocol):
    """Who is told what a process does."""

    def logged(self, line: str) -> None:
        """It wrote a line."""

    def exited(self, code: int) -> None:
        """It has ended, and all that it started; negative codes are signals."""


Starter = Callable[[Sequence[str], Mapping[str, str], str | None, ProcessListener], Process]
"""Starts a command with an environment in a directory."""


class WorkerProcess:
    """A command that runs under the launcher; needs a running event loop.

    Args:
        command: what to run.
        env: its whole environment.
        cwd: its directory, or None for ours.
        listener: who is told of log lines and of the end.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str | None, listener: ProcessListener
    ) -> None:
        self.pid: int | None = None
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._exit_code: int | None = None
        self._messages = b""
        self._tail = b""
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        try:
            # Isolated and without site-packages: what the launcher imports is not the worker's business.
            self._launcher = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LAUNCHER), str(theirs.fileno()), *command],
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                env=dict(env),
                cwd=cwd,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        except OSError:
            ours.close()
            os.close(reading)
            raise
        finally:
            theirs.close()
            os.close(writing)
        self._line: socket.socket | None = ours
        self._log_fd: int | None = reading
        ours.settimeout(0)
        os.set_blocking(reading, False)
        self._loop.add_reader(ours, self._read_messages)
        self._loop.add_reader(reading, self._read_log)

    def terminate(self) -> None:
        """Ask the worker to end."""
        if self._line is not None:
            self._launcher.terminate()

    def kill(self) -> None:
        """End the worker and all that it started; `exited` follows."""
        if self._line is not None:
            # The launcher reads the end of the line as the emulator's end.
            self._line.shutdown(socket.SHUT_WR)

    def _read_messages(self) -> None:
        """What the launcher says: `pid N`, then `exit N`, then the end of the line."""
        if self._line is None:
            return
        try:
            data = self._line.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._messages += data
        *lines, self._messages = self._messages.split(b"\n")
        for line in lines:
            word, _, number = line.decode().partition(" ")
            if word == "pid":
                self.pid = int(number)
            elif number.lstrip("-").isdecimal():
                self._exit_code = int(number)
        if not data:
            self._loop.remove_reader(self._line)
            self._line.close()
            self._line = None
            # It has closed the line, which is the last thing that it does.
            self._launcher.wait()
            while self._log_fd is not None and self._read_log():
                pass
            self._close_log()
            if self._exit_code is None and self.pid is not None:
                # The launcher was killed itself, so its work is left to us, as far as we can see.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            self._listener.exited(_UNKNOWN_EXIT if self._exit_code is None else self._exit_code)

    def _read_log(self) -> bool:
        """Take what there is; return whether there may be more at once."""
        if self._log_fd is None:
            return False
        try:
            data = os.read(self._log_fd, _READ_BYTES)
        except BlockingIOError:
            return False
        self._tail += data
        *lines, self._tail = self._tail.split(b"\n")
        if not data or len(self._tail) > _LINE_BYTES:
            lines.append(self._tail)
            self._tail = b""
        for line in lines:
            text = line[:_LINE_BYTES].decode(errors="replace").rstrip()
            if text:
                self._listener.logged(readable(text))
        if not data:
            self._close_log()
        return bool(data)

    def _close_log(self) -> None:
        if self._log_fd is not None:
            self._loop.remove_reader(self._log_fd)
            os.close(self._log_fd)
            self._log_fd = None


def readable(line: str) -> str:
    """A log line as a person reads it: the SDK writes JSON where it knows its endpoint, as it does on the platform."""
    if line.startswith('{"requestId":'):
        try:
            entry: Any = json.loads(line)
        except ValueError:
            return line
        job = f"{entry['requestId']} | " if entry.get("requestId") else ""
        return f"{str(entry.get('level', '')).ljust(7)}| {job}{entry.get('message', '')}"
    return line


def worker_environment(base_url: str, endpoint: str, worker: str, key: str, ping_interval_ms: int) -> dict[str, str]:
    """The variables by which the SDK finds the platform (runpod 1.12.0: `rp_job`, `rp_http`, `rp_ping`).

    `$ID` and `$RUNPOD_POD_ID` stay as they are: the SDK puts the worker's and the job's id there.
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
        # The SDK's checks of the machine are about the platform's own machines: they end a worker that cannot reach the
        # internet, or has a disk that is nine tenths full. An endpoint's own variables may ask for them.
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
        "PYTHONUNBUFFERED": "1",
    }
