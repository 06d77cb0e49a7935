"""Processes for tests: their output goes to a file, and they are killed with all their children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).parents[1]
# Makes vLLM start fast and offline; for workers and for vLLM's own server.
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# The same for workers that answer many requests: the engine core runs the model itself, as with one GPU. On a CPU vLLM
# gives the model a process of its own, and each of the two spins on a core for a second after every message.
BUSY_ENVIRONMENT = {
    **VLLM_ENVIRONMENT,
    "DISTRIBUTED_EXECUTOR_BACKEND": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
    "OMP_NUM_THREADS": "1",
}
# By default vLLM binds the threads of every engine to the same cores, the first ones. With this, two engines that run
# at the same time use different cores, if there are two.
OTHER_CORE = {"VLLM_CPU_OMP_THREADS_BIND": str(max(os.sched_getaffinity(0)))}


class Process:
    """A process group whose output goes to a file."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log_path = log
        self._log: IO[bytes] = log.open("wb")
        self.popen = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def family(self) -> list[psutil.Process]:
        """Return the process and its descendants that are running."""
        try:
            process = psutil.Process(self.popen.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Wait until the condition holds.

        Raises:
            RuntimeError: the process ended before; the message is its log.
            TimeoutError: the condition does not hold in time; the message is the log.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.popen.poll() is not None:
                raise RuntimeError(f"ended with {self.popen.returncode}:\n{self.log[-4000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout_s} s:\n{self.log[-4000:]}")
            time.sleep(0.05)

    def end(self) -> None:
        """Kill the process and its descendants."""
        family = self.family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=60)
        self.popen.wait(timeout=60)
        self._log.close()


@contextmanager
def running(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[Process]:
    """Run a process during the block, and kill it afterwards."""
    process = Process(arguments, environment, log)
    try:
        yield process
    finally:
        process.end()
