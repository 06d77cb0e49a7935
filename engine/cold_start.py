"""Where the time of a start goes: from the worker's exec to its first output, phase by phase.

Phases follow one another and add up to the whole. What is done beside them, such as importing the SDK while the engine
starts, costs nothing here; what is left to do of it counts where it is waited for.

    interpreter   exec to the first line of the worker's own code
    imports       vLLM and torch
    configuration settings, flags, and which model
    fitness       the SDK's checks of the machine, which run beside all before: what is left of them
    model_files   a download, if one is needed
    engine        the engine's processes, but for the next two
    weights       reading the weights
    warm_up       memory profile, KV cache, compilation, graph capture
    sdk           importing and starting the SDK
    app           vLLM's OpenAI app
    first_take    until the first job is there; a worker that nobody needs yet waits here
    first_output  that job's first output
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path

# What vLLM 0.32 logs at INFO in the engine's processes, and the phase that it ends.
_NOTED = (
    (re.compile(r"Loading weights took ([\d.]+) s"), "weights"),
    (re.compile(r"init engine \(.*\) took ([\d.]+) s"), "warm_up"),
)
FINAL_PHASE = "first_output"

_log = logging.getLogger(__name__)


class ColdStart:
    """One start of one worker.

    Args:
        begun: when it began, on the monotonic clock; by default, when this process did.
    """

    def __init__(self, begun: float | None = None) -> None:
        self._last = self._begun = time.monotonic() - _age_s() if begun is None else begun
        self._phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """A phase has ended: all that has passed since the last one belongs to it. Told twice, it counts once."""
        if phase not in self._phases and FINAL_PHASE not in self._phases:
            now = time.monotonic()
            self._phases[phase] = now - self._last
            self._last = now

    def split_engine_phase(self, lines: str) -> None:
        """The engine runs; what its processes logged meanwhile tells which part of its phase was another one."""
        self.mark("engine")
        for pattern, phase in _NOTED:
            # Workers load at the same time: the slowest of them is what is waited for.
            seconds = max(map(float, pattern.findall(lines)), default=0.0)
            self._phases[phase] = min(seconds, self._phases["engine"])
            self._phases["engine"] -= self._phases[phase]

    @property
    def total_s(self) -> float:
        """From the beginning to the end of the last phase."""
        return self._last - self._begun

    def document(self) -> dict[str, object]:
        """`{"total_s": 14.2, "phases_s": {"interpreter": 0.05, ...}}`: the phases that have ended, in their order."""
        return {
            "total_s": round(self.total_s, 3),
            "phases_s": {phase: round(seconds, 3) for phase, seconds in self._phases.items()},
        }

    def log(self, what: str) -> None:
        """One line: what has been reached, and the phases until then."""
        _log.info("%s %s", what, json.dumps(self.document()))


def _age_s() -> float:
    """Seconds since this process began: since its exec, to a hundredth of a second. 0 where Linux does not tell.

    Source: proc_pid_stat(5), field 22, counted from behind the command's name, which may hold anything.
    """
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        ticks = int(fields[22 - 3])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return 0.0


WORKER = ColdStart()
