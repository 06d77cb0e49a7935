"""How a worker starts and ends as the platform's host logs it: pull of the image, start of the container, its end.

What runs is the emulator's command, whatever the image is. The lines are those of RunPod's host log, as its users show
it in public issues; one that does not exist keeps the worker initializing, with the pull's error in its log.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from emulator.core.process import Process, ProcessListener, StartProcess

PULL_RETRY_S: Final = 10.0
_WORKER_VARIABLE = "RUNPOD_POD_ID"


@dataclass(frozen=True)
class Host:
    """The machine that an endpoint's workers run on; requires a running event loop.

    Args:
        start: starts a process.
        image: returns the image of the endpoint's current version.
        note: returns what the host's log must say about a worker first; None: nothing.
        log: receives the host's lines: `(worker, line)`.
        pull_s: how long the pull of an image takes.
        is_missing: returns whether there is no such image.
    """

    start: StartProcess
    image: Callable[[], str]
    note: Callable[[], str | None]
    log: Callable[[str, str], None]
    pull_s: float
    is_missing: Callable[[str], bool]

    def start_worker(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str | None, listener: ProcessListener
    ) -> Process:
        """Start a worker's process when its image is there; `StartProcess` of the endpoint's fleet."""
        return _Container(self, command, env, cwd, listener)


class _Container:
    """One worker's container; it has no process while its image is pulled."""

    def __init__(
        self, host: Host, command: Sequence[str], env: Mapping[str, str], cwd: str | None, listener: ProcessListener
    ) -> None:
        self._host = host
        self._arguments = (command, env, cwd)
        self._listener = listener
        self._worker = env[_WORKER_VARIABLE]
        self._image = host.image()
        self._process: Process | None = None
        self._pull: asyncio.TimerHandle | None = None
        if (note := host.note()) is not None:
            self._log(note)
        self._log(f"create container {self._image}")
        if host.is_missing(self._image) or host.pull_s > 0:
            self._log(f"image pull: {self._image}: pending")
            self._pull = asyncio.get_running_loop().call_later(host.pull_s, self._end_pull)
        else:
            self._log(f"Status: Image is up to date for {self._image}")
            self._start()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def terminate(self) -> None:
        """Stop the container: SIGTERM for its process, or the end of the pull."""
        self._log(f"stop container {self._image}")
        if self._process is None:
            self._exit_without_process(signal.SIGTERM)
        else:
            self._process.terminate()

    def kill(self) -> None:
        """Kill the container's processes, or end the pull."""
        if self._process is None:
            self._exit_without_process(signal.SIGKILL)
        else:
            self._process.kill()

    def freeze(self) -> None:
        """Freeze the container's processes."""
        if self._process is not None:
            self._log(f"freeze container {self._image}")
            self._process.freeze()

    def thaw(self) -> None:
        """Let them go on."""
        if self._process is not None:
            self._log(f"restore container {self._image}")
            self._process.thaw()

    def on_log_line(self, line: str) -> None:
        self._listener.on_log_line(line)

    def on_exit(self, code: int) -> None:
        # 128 + the signal's number, as a container's exit code is written.
        self._log(f"worker exited with exit code {128 - code if code < 0 else code}")
        self._log(f"remove container {self._image}")
        self._listener.on_exit(code)

    def _end_pull(self) -> None:
        has_tag = ":" in self._image.rpartition("/")[2]
        repository, _, tag = self._image.rpartition(":") if has_tag else (self._image, "", "latest")
        if self._host.is_missing(self._image):
            self._log(
                f"error pulling image: Error response from daemon: manifest for {repository}:{tag} not found: "
                "manifest unknown: manifest unknown"
            )
            self._pull = asyncio.get_running_loop().call_later(PULL_RETRY_S, self._end_pull)
            return
        self._pull = None
        self._log(f"{tag} Pulling from {repository}")
        self._log(f"Digest: sha256:{sha256(self._image.encode()).hexdigest()}")
        self._log(f"Status: Downloaded newer image for {self._image}")
        try:
            self._start()
        except (OSError, ValueError) as error:
            self._listener.on_log_line(f"{self._arguments[0][0]} cannot be started: {error}")
            self.on_exit(127)

    def _start(self) -> None:
        self._log(f"start container for {self._image}: begin")
        self._process = self._host.start(*self._arguments, self)

    def _exit_without_process(self, number: signal.Signals) -> None:
        if self._pull is not None:
            self._pull.cancel()
            self._pull = None
            # Not from within the fleet's call.
            asyncio.get_running_loop().call_soon(self.on_exit, -number)

    def _log(self, line: str) -> None:
        self._host.log(self._worker, line)
