"""Ends child processes with the worker, also when it is killed and cannot end them itself.

vLLM's engine core and its workers, and the SDK's ping, are children of the worker. After a SIGKILL they would go on:
the engine would keep its memory, and the ping would report to the platform that all is well. Linux kills them when
their parent ends if they request it (prctl(2), `PR_SET_PDEATHSIG`); elsewhere this does nothing.
"""

from __future__ import annotations

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def set_parent_death_signal() -> None:
    """Let Linux kill this process when its parent ends.

    The parent's *thread* counts: start children from a thread that lasts as long as the process.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_children_on_exit() -> None:
    """Let every process that is forked from now on end with its parent.

    A process that executes another program, by `spawn` or as a command, must call `set_parent_death_signal` itself.
    """
    os.register_at_fork(after_in_child=set_parent_death_signal)
