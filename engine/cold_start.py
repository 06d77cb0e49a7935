"""Measures the phases of a start, from the worker's exec to its first output.

Phases do not overlap, and add up to the total. Work in parallel to a phase, such as importing the SDK while the engine
starts, does not count; only the time that is spent waiting for it does.

    interpreter   exec to the first line of the worker's own code
    imports       vLLM and torch
    configuration settings, flags, finding the model
    fitness       waiting for the SDK's checks of the machine, which run in parallel to the phases before
    model_files   download, if one is needed
    engine        the engine's processes, except for the next five, which vLLM logs (`engine.backend.startup_phases`)
    weights       reading the weights
    compile       torch.compile, or loading what it has compiled before
    profile       a pass with dummy inputs, to see how much memory is left for the KV cache
    capture       CUDA graph capture, to the second
    kernels       the KV cache, and warming up other kernels
    sdk           importing and starting the SDK
    app           vLLM's OpenAI app
    first_request a short request, with `WARM_UP`
    first_take    waiting for the first job; an idle worker stays here
    first_output  that job's first output
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

FINAL_PHASE = "first_output"

_log = logging.getLogger(__name__)


class ColdStart:
    """One start of one worker.

    Args:
        started_at: when it began, by `time.monotonic()`; by default, when this process did.
    """

    def __init__(self, started_at: float | None = None) -> None:
        self._started_at = time.monotonic() - _process_age_s() if started_at is None else started_at
        self._last = self._started_at
        self._phases: dict[str, float] = {}
        self._caches: dict[str, str] = {}

    def mark(self, phase: str) -> None:
        """Mark the end of a phase, which began when the last one ended; only the first mark of a phase counts."""
        if phase not in self._phases and FINAL_PHASE not in self._phases:
            now = time.monotonic()
            self._phases[phase] = now - self._last
            self._last = now

    def split_engine_phase(self, parts: Mapping[str, float]) -> None:
        """Mark the end of the engine phase, and make some of its time phases of their own.

        Args:
            parts: their durations in seconds, by phase.
        """
        self.mark("engine")
        for phase, seconds in parts.items():
            self._phases[phase] = min(seconds, self._phases["engine"])
            self._phases["engine"] -= self._phases[phase]

    def note_cache(self, phase: str, found: str) -> None:
        """Note what a phase found in its cache: `used`, `empty` or `unloadable`."""
        self._caches[phase] = found

    @property
    def total_s(self) -> float:
        """Time from the start to the end of the last phase, in seconds."""
        return self._last - self._started_at

    def document(self) -> dict[str, object]:
        """Return the phases that have ended, in order, and what they found in their caches.

        `{"total_s": 14.2, "phases_s": {"interpreter": 0.05, ..., "compile": 6.8, ...}, "caches": {"compile": "used"}}`,
        without `caches` if nothing is known of any.
        """
        return {
            "total_s": round(self.total_s, 3),
            "phases_s": {phase: round(seconds, 3) for phase, seconds in self._phases.items()},
            **({"caches": dict(self._caches)} if self._caches else {}),
        }

    def log(self, label: str) -> None:
        """Log one line: the label, and `document` as JSON."""
        _log.info("%s %s", label, json.dumps(self.document()))


def _process_age_s() -> float:
    """Return the seconds since this process was executed, with a resolution of 10 ms; 0 if the system does not know.

    Source: proc_pid_stat(5), field 22, counted from behind the command's name, which may contain any character.
    """
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        ticks = int(fields[22 - 3])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return 0.0


WORKER = ColdStart()
