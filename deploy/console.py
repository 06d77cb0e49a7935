"""What the user sees: results on stdout, everything else on stderr, no secret in either."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from deploy.environment import Redaction

_WIDTH = 100
# Sequences for colours and the cursor, and other control characters; a worker's log and a model's answer may have them.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Console:
    """Writes for one command.

    Args:
        redaction: hides secrets.
        out: for results.
        err: for messages and progress.
    """

    def __init__(self, redaction: Redaction, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.redaction = redaction
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._progress: Progress | None = None

    def result(self, text: str = "") -> None:
        """Write a line of the result."""
        self._write(self._out, text)

    def log(self, text: str) -> None:
        """Write a message."""
        self._write(self._err, f"deploy: {text}")

    def _write(self, file: TextIO, text: str) -> None:
        encoding = getattr(file, "encoding", None) or "utf-8"
        shown = self.shown(text).encode(encoding, "backslashreplace").decode(encoding)
        with tqdm.external_write_mode(file=file):  # not into a progress bar
            file.write(shown + "\n")
            file.flush()

    def shown(self, text: str) -> str:
        """Return a text without secrets, and without what would control the terminal."""
        return _CONTROL.sub("", self.redaction.apply(text))

    def progress(self, phases: tuple[str, ...]) -> Progress:
        """Return a progress bar through these phases, or lines if stderr is no terminal, or one without a width."""
        return Progress(self, phases, self._err)


class Progress:
    """The phases of a start, each with how long it took. It begins when it is made.

    Args:
        console: for lines.
        phases: in order; some may be skipped.
        file: of the bar.
        clock: monotonic time in seconds.
    """

    def __init__(
        self, console: Console, phases: tuple[str, ...], file: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._phases = phases
        self._clock = clock
        self._began = self._phase_began = clock()
        self._current = 0
        self.durations_s: dict[str, float] = {}
        self._bar: Any = None
        if file.isatty() and _has_width(file):
            layout = "{desc} {bar:20} {n_fmt}/{total_fmt} [{elapsed}]{postfix}"
            self._bar = tqdm(total=len(phases), file=file, bar_format=layout, leave=False, dynamic_ncols=True)
            self._show("")

    @property
    def phase(self) -> str:
        """The current phase."""
        return self._phases[self._current]

    @property
    def total_s(self) -> float:
        """The time since it began."""
        return self._clock() - self._began

    def reach(self, phase: str, detail: str = "") -> None:
        """Go on to a phase; one that is past, or current, is ignored."""
        if (index := self._phases.index(phase)) > self._current:
            self._end_phase()
            self._current = index
            self._show(detail)

    def detail(self, text: str) -> None:
        """Show what happens in the current phase; a bar shows it until the next."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._console.shown(text)[:_WIDTH])

    def refresh(self) -> None:
        """Draw the bar again, with the time that has passed."""
        if self._bar is not None:
            self._bar.refresh()

    def end(self) -> None:
        """End the last phase."""
        self._end_phase()
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _end_phase(self) -> None:
        now = self._clock()
        self.durations_s[self.phase] = now - self._phase_began
        self._phase_began = now

    def _show(self, detail: str) -> None:
        if self._bar is None:
            self._console.log(f"{self.total_s:6.1f} s  {self.phase}{f': {detail}' if detail else ''}")
        else:
            self._bar.n = self._current
            self._bar.set_description_str(self.phase)
            self.detail(detail)


def _has_width(file: TextIO) -> bool:
    """Return whether a terminal says how wide it is: on one that does not, tqdm shows nothing."""
    try:
        return os.get_terminal_size(file.fileno()).columns > 0
    except OSError:
        return True


def table(rows: Mapping[str, str]) -> str:
    """Return lines of a label and a text each; the further lines of a text are indented like the first."""
    width = max(map(len, rows), default=0) + 2
    return "\n".join(
        f"{label if number == 0 else '':{width}}{line}".rstrip()
        for label, text in rows.items()
        for number, line in enumerate(text.splitlines() or [""])
    )
