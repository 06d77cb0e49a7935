"""The SDK's fitness checks of the machine, in a process of their own, before the engine is loaded.

The SDK runs them as it starts its loop: after the load, so that a bad machine is found when the load has been paid for,
and in the serving process, where on a GPU a CUDA context stays behind on every device. Here they run beside the imports
of vLLM, and the process has ended, its GPU memory with it, before the engine is made. A check that fails is reported to
the platform by the SDK (runpod 1.12, `rp_fitness`).
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

# By default the SDK's own limits add up to a minute: 30 s for the GPU's memory, 5 to 10 s for each other program that
# it asks. What it does not limit is the start of CUDA, and a driver that does not answer.
TIMEOUT_S = 120.0
# What switches the checks of the SDK off: those of the machine, and the first of the GPU.
SWITCHES = ("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "RUNPOD_SKIP_GPU_CHECK")
_ROOT = Path(__file__).resolve().parents[2]
_NO_CHECKS = 3
_KILL_S = 5.0
_COPY_BYTES = 1 << 20
_FAILED = re.compile(r"Fitness check failed: (\S+) \| (.+)")

_log = logging.getLogger(__name__)


class Checks:
    """The checks, from the constructor on; they end with the block: `with Checks() as checks: ... checks.wait()`.

    Where the environment switches all of them off, there is no process.

    Args:
        timeout_s: how long they may take.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        # A copy of what the SDK logs, which tells why a check failed. Its lines go to the log from there: as it reports
        # a bad machine, the platform may end the worker.
        self._copy = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the block)
        if any(os.environ.get(switch, "").lower() != "true" for switch in SWITCHES):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.startup.fitness", str(self._copy.fileno())],
                cwd=_ROOT,
                pass_fds=[self._copy.fileno()],
                process_group=0,  # The SDK asks other programs, which are to end with it.
                preexec_fn=set_parent_death_signal,  # noqa: PLW1509 (no other thread runs that early)
            )

    def __enter__(self) -> Self:
        """The checks run already."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs."""
        self._copy.close()
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            # A process that hangs in a driver cannot be killed.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_S)

    def wait(self) -> None:
        """Wait until the machine has passed; then the SDK does not check it again in this process.

        Raises:
            ConfigurationError: it has not passed, or not in time.
        """
        if self._process is None:
            return
        try:
            status = self._process.wait(max(self._deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            *_, last = self._lines() or ["nothing was logged"]
            raise ConfigurationError(
                f"the fitness checks of the SDK have not ended after {self._timeout_s:g} s; its last line: {last}"
            ) from None
        if status == _NO_CHECKS:
            _log.warning("The fitness checks are left to the SDK: this version has none that can run before the load")
        elif status:
            failed = next(filter(None, map(_FAILED.match, self._lines())), None)
            raise ConfigurationError(
                f"the fitness check {failed[1]} failed: {failed[2]}"
                if failed
                else f"the fitness checks of the SDK ended with {status}: the log says why"
            )
        else:
            os.environ.update(dict.fromkeys(SWITCHES, "true"))

    def _lines(self) -> list[str]:
        # The process may still have the file open, and share its position.
        return os.pread(self._copy.fileno(), _COPY_BYTES, 0).decode(errors="replace").splitlines()


def main(copy: int) -> int:
    """Run the checks as the SDK does: one that fails is reported to the platform and ends this process with 1.

    Args:
        copy: an open file, which gets the messages that the SDK logs, at any level.
    """
    try:
        from runpod.serverless.modules.rp_fitness import run_fitness_checks
        from runpod.serverless.modules.rp_logger import RunPodLogger
    except ImportError:
        return _NO_CHECKS
    import asyncio

    log = RunPodLogger.log

    def copying(self: Any, message: Any, *arguments: Any, **options: Any) -> None:
        os.write(copy, (" ".join(str(message).split()) + "\n").encode())
        log(self, message, *arguments, **options)

    RunPodLogger.log = copying
    asyncio.run(run_fitness_checks())
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
