"""Leave to use AMX, the registers for matrices of Intel's processors.

Linux kills a process that uses them without having asked (arch_prctl(2), `ARCH_REQ_XCOMP_PERM`). vLLM's attention does
not ask; oneDNN does, at its first product of two matrices. So where the first request is of one token, vLLM 0.32 on a
CPU with AMX ends by SIGILL. A forked process has its parent's leave; one that starts another program asks anew.
"""

from __future__ import annotations

import platform
import sys

_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def ask() -> None:
    """Ask for it; where there is no AMX, nothing comes of it."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        import ctypes

        ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
