"""Children end with the worker, however it ends: one that is killed cannot tell them any more.

vLLM's engine core and its workers, and the SDK's ping, are children of the worker. Left to themselves they outlive a
worker that gets SIGKILL: the engine keeps its memory, and the ping goes on telling the platform that all is well.
Linux ends them itself once they have asked for it (prctl(2), `PR_SET_PDEATHSIG`); elsewhere this does nothing.
"""

from __future__ import annotations

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let this process be killed when its parent ends.

    Strictly it is the parent's *thread* that counts: children have to be started from one that lasts.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_this_process() -> None:
    """Let every process that is forked from now on end with the one that forked it.

    One that starts another program, by `spawn` or as a command, has to ask for itself, by `end_with_parent`.
    """
    os.register_at_fork(after_in_child=end_with_parent)
