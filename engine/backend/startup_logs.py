"""Captures log lines of the engine's processes while they start: why they failed, and how long they took.

vLLM reports an error in one of its processes to the worker only as "see above", and durations not at all. So its
processes also write their log lines to files that the worker reads (`engine.backend.startup_phases`).
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from engine.backend import compat

_LINE = re.compile(r"(?P<time_s>\d+\.\d{3}) (?P<process>\d+) (?P<message>.*)")
_DIRECTORY = "VLLM_SERVERLESS_STARTUP_LOGS"


class Line(NamedTuple):
    """A log record that is no error: when it was logged (`time.time()`), by which process, and its message."""

    time_s: float
    process: int
    message: str


class StartupLogs:
    """What was captured."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def errors(self) -> str:
        """Log records of errors, with tracebacks."""
        return _read(self._directory / "errors")

    @property
    def records(self) -> list[Line]:
        """All other records, in order."""
        fields = (_LINE.fullmatch(line) for line in _read(self._directory / "lines").splitlines())
        # A line may be incomplete, as on a full disk.
        return [Line(float(one["time_s"]), int(one["process"]), one["message"]) for one in fields if one is not None]


@contextmanager
def captured() -> Iterator[StartupLogs]:
    """Capture the log lines of this process and its children in this block."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ[_DIRECTORY] = directory
        install()
        try:
            yield StartupLogs(Path(directory))
        finally:
            del os.environ[_DIRECTORY]


def install() -> None:
    """Capture the log lines of this process, and of those that it forks, if the worker asks for it."""
    directory = os.environ.get(_DIRECTORY)
    if directory is not None:
        for name in compat.STARTUP_LOGGERS:
            logging.getLogger(name).addFilter(_CaptureFilter(Path(directory)))


class _CaptureFilter(logging.Filter):
    """Writes records to a file. Not a handler: vLLM configures its logging again and removes handlers."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def filter(self, record: logging.LogRecord) -> bool:
        failed = record.levelno >= logging.ERROR
        # The directory may be gone, or the disk full: an error here would end vLLM's process.
        with (
            suppress(OSError),
            (self._directory / ("errors" if failed else "lines")).open("a", encoding="utf-8") as file,
        ):
            file.write((logging.Formatter().format(record) if failed else _line(record)) + "\n")
        return True


def _line(record: logging.LogRecord) -> str:
    return f"{record.created:.3f} {record.process} {' '.join(record.getMessage().splitlines())}"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
