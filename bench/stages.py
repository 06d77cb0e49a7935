"""Stages within a time budget: the most valuable first, and each one's results are kept as soon as there are any."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.report import print_progress
from bench.systems import StartError


class StageError(Exception):
    """A stage ran but has no valid result; the message says why."""


class Budget:
    """The time that a run may take.

    Args:
        seconds: from now.
        clock: the current time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends_at = clock() + seconds

    @property
    def left_s(self) -> float:
        """What is left of it, in seconds; never negative."""
        return max(self._ends_at - self._clock(), 0.0)


@dataclass
class Outcome:
    """What became of one stage.

    Args:
        stage: its name.
        title: what it measures.
        state: `running`, `done`, `failed` or `skipped`.
        reason: why it failed or was skipped.
        seconds: how long it took.
        figures: what it has measured so far, for the JSON.
        lines: the same for people.
        log: the last lines of what did not start, or of a command that failed.
    """

    stage: str
    title: str
    state: str = "running"
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Args:
        name: what selects it on the command line.
        title: what it measures.
        needs_s: it is not started if less time is left.
        run: fills in an outcome's figures and lines; calls the function that it is given whenever there are new ones.
    """

    name: str
    title: str
    needs_s: float
    run: Callable[[Outcome, Callable[[], None]], None]


def run_stages(stages: Sequence[Stage], budget: Budget, changed: Callable[[list[Outcome]], None]) -> list[Outcome]:
    """Run stages in order, each one that still fits; one that fails does not keep the others from running.

    Args:
        stages: what to run.
        budget: the time for all of them.
        changed: called with the outcomes so far whenever one has changed.
    """
    outcomes: list[Outcome] = []
    for stage in stages:
        outcome = Outcome(stage.name, stage.title)
        outcomes.append(outcome)
        left_s = budget.left_s
        if left_s < stage.needs_s:
            outcome.state = "skipped"
            outcome.reason = f"it needs about {stage.needs_s:.0f} s, and {left_s:.0f} s are left"
        else:
            print_progress(f"{stage.name}: {stage.title} ({left_s:.0f} s left)")
            try:
                stage.run(outcome, lambda: changed(outcomes))
                outcome.state = "done"
            except Exception as error:  # noqa: BLE001 (whatever it is, the other stages are still worth running)
                outcome.state = "failed"
                outcome.reason = f"{type(error).__name__}: {error}"
                outcome.log += _log_of(error)
            except BaseException:
                outcome.state, outcome.reason = "failed", "interrupted"
                changed(outcomes)
                raise
            outcome.seconds = left_s - budget.left_s
        print_progress(f"{stage.name}: {outcome.state}{f', {outcome.reason}' if outcome.reason else ''}")
        changed(outcomes)
    return outcomes


def _log_of(error: Exception) -> list[str]:
    match error:
        case StartError():
            return list(error.log)
        case subprocess.CalledProcessError() | subprocess.TimeoutExpired():
            output = error.stderr or ""
            return (output if isinstance(output, str) else output.decode(errors="replace")).splitlines()
    return []
