"""How vLLM starts its processes on a CPU."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def prefer_fork() -> None:
    """Let vLLM fork its processes on a CPU, where it would spawn them and each would import all of vLLM again.

    vLLM spawns them so that other libraries are loaded first (`LD_PRELOAD`) and OpenMP reads its environment again.
    Where these libraries are loaded already, and OpenMP is GNU's, which can be configured later, a fork is as good.
    """
    from vllm.platforms import current_platform

    preloaded = {
        os.path.realpath(path) for path in os.environ.get("LD_PRELOAD", "").replace(" ", ":").split(":") if path
    }
    openmp = next((path for path in preloaded if Path(path).name.startswith("libgomp")), None)
    if current_platform.is_cpu() and openmp is not None and preloaded <= _mapped_files():
        os.environ[START_METHOD] = "fork"
        library = ctypes.CDLL(openmp)
        os.register_at_fork(after_in_child=lambda: _apply_openmp_environment(library))


def _mapped_files() -> set[str]:
    """Return the files that are mapped into this process, its libraries among them."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) > 5}  # noqa: PLR2004 (proc_pid_maps(5))


def _apply_openmp_environment(openmp: ctypes.CDLL) -> None:
    """Do in a forked process what OpenMP does with the environment when it is loaded; vLLM has set it by then."""
    if cpus := os.environ.get("GOMP_CPU_AFFINITY"):
        os.sched_setaffinity(0, map(int, cpus.split()))
    if threads := os.environ.get("OMP_NUM_THREADS"):
        openmp.omp_set_num_threads(int(threads))
