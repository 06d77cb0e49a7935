"""Runs the SDK's fitness checks of the machine in a separate process, before the engine is loaded.

The SDK itself runs them when its loop starts. That is after the load, which is paid for even on a bad machine, and in
the serving process, where they leave a CUDA context on every GPU. Here they run during the imports of vLLM, and their
process has ended and freed its GPU memory before the engine is made. The SDK reports a failed check to the platform
(runpod 1.12, `rp_fitness`).
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from engine.child_processes import set_parent_death_signal
from engine.errors import ConfigurationError

# The SDK's default timeouts add up to a minute: 30 s for the GPU's memory, 5 to 10 s for each other program that it
# runs. It has none for the initialisation of CUDA, nor for a driver that hangs.
TIMEOUT_S = 120.0
# Variables that disable the SDK's checks: those of the system, and the first of the GPU.
SWITCHES = ("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "RUNPOD_SKIP_GPU_CHECK")
_ROOT = Path(__file__).resolve().parents[2]
_NO_CHECKS = 3
_KILL_TIMEOUT_S = 5.0
_MAX_LOG_BYTES = 1 << 20
_FAILED = re.compile(r"Fitness check failed: (\S+) \| (.+)")

_log = logging.getLogger(__name__)


class Checks:
    """Checks that the constructor starts, and the end of the block stops: `with Checks() as checks: ... checks.wait()`.

    If the environment disables all of them, no process is started.

    Args:
        timeout_s: how long they may take, in seconds.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        # A copy of what the SDK logs, for the reason of a failure. The process also logs it directly: the platform may
        # end the worker as soon as a bad machine is reported.
        self._log_copy = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the block)
        if any(os.environ.get(switch, "").lower() != "true" for switch in SWITCHES):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.startup.fitness", str(self._log_copy.fileno())],
                cwd=_ROOT,
                pass_fds=[self._log_copy.fileno()],
                process_group=0,  # So that the programs that the SDK runs can be killed too.
                preexec_fn=set_parent_death_signal,  # noqa: PLW1509 (no thread that runs that early imports anything)
            )

    def __enter__(self) -> Self:
        """Return the checks, which are running."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill what still runs."""
        self._log_copy.close()
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            # A process that hangs in a driver cannot be killed.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_TIMEOUT_S)

    def wait(self) -> None:
        """Wait until the machine has passed, and disable the SDK's own run of the checks.

        Raises:
            ConfigurationError: a check failed, or they have timed out.
        """
        if self._process is None:
            return
        try:
            status = self._process.wait(max(self._deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            *_, last = self._logged_lines() or ["nothing was logged"]
            raise ConfigurationError(
                f"the fitness checks of the SDK have not ended after {self._timeout_s:g} s; its last log line: {last}"
            ) from None
        if status == _NO_CHECKS:
            _log.warning("The fitness checks are left to the SDK: this version cannot run them before the load")
        elif status:
            failed = next(filter(None, map(_FAILED.match, self._logged_lines())), None)
            raise ConfigurationError(
                f"the fitness check {failed[1]} failed: {failed[2]}"
                if failed
                else f"the fitness checks of the SDK ended with status {status}; see the worker log"
            )
        else:
            os.environ.update(dict.fromkeys(SWITCHES, "true"))

    def _logged_lines(self) -> list[str]:
        # Not `read`: a process that still runs shares the position in the file.
        return os.pread(self._log_copy.fileno(), _MAX_LOG_BYTES, 0).decode(errors="replace").splitlines()


def main(log_copy: int) -> int:
    """Run the checks as the SDK does: it reports a failed check to the platform and ends this process with status 1.

    Args:
        log_copy: file descriptor to which the SDK's log messages of every level are copied.

    Returns:
        The exit status: 0 if the machine has passed, 3 if the SDK has no such checks.
    """
    try:
        from runpod.serverless.modules.rp_fitness import run_fitness_checks
        from runpod.serverless.modules.rp_logger import RunPodLogger
    except ImportError:
        return _NO_CHECKS
    import asyncio

    log = RunPodLogger.log

    def log_and_copy(self: Any, message: Any, *arguments: Any, **options: Any) -> None:
        os.write(log_copy, (" ".join(str(message).split()) + "\n").encode())
        log(self, message, *arguments, **options)

    RunPodLogger.log = log_and_copy
    asyncio.run(run_fitness_checks())
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
