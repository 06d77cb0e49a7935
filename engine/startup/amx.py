"""Requests permission to use AMX, the matrix extensions of Intel's processors.

Linux kills a process that uses them without permission (arch_prctl(2), `ARCH_REQ_XCOMP_PERM`). oneDNN requests it at
its first matrix multiplication, vLLM's attention does not: if the first request has only one token, vLLM 0.32 on a CPU
with AMX is killed by SIGILL. A forked process inherits the permission; it is lost at exec.
"""

from __future__ import annotations

import platform
import sys

_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def request_permission() -> None:
    """Request the permission for this process; without AMX, this has no effect."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        import ctypes

        ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
