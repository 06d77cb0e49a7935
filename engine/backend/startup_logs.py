"""What the engine's processes note for the worker to read while they start: why they failed, how long they took.

What goes wrong in vLLM's processes is told to the worker as "see above" alone, and how long they take not at all. So
they note lines of their logs in files that both know.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DIRECTORY = "VLLM_SERVERLESS_START_NOTES"
# Who logs why the engine's process, or one of its workers, could not start, and what took how long (vLLM 0.32).
_LOGGERS = (
    "vllm.compilation.backends",
    "vllm.compilation.decorators",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
)


class Notes:
    """What has been noted."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def errors(self) -> str:
        """Log records of errors, tracebacks included."""
        return _read(self._directory / "errors")

    @property
    def lines(self) -> str:
        """The messages of all other records, one a line."""
        return _read(self._directory / "lines")


@contextmanager
def taken() -> Iterator[Notes]:
    """The notes of this process and its children, in this block."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ[_DIRECTORY] = directory
        take()
        try:
            yield Notes(Path(directory))
        finally:
            del os.environ[_DIRECTORY]


def take() -> None:
    """Let this process, and those that it forks, take notes, if the worker wants any."""
    directory = os.environ.get(_DIRECTORY)
    if directory is not None:
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_Note(Path(directory)))


class _Note(logging.Filter):
    """Writes records down as they pass. Not a handler: vLLM sets up its logging anew and takes handlers away."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def filter(self, record: logging.LogRecord) -> bool:
        failed = record.levelno >= logging.ERROR
        if self._directory.is_dir():
            with (self._directory / ("errors" if failed else "lines")).open("a", encoding="utf-8") as file:
                file.write((logging.Formatter().format(record) if failed else record.getMessage()) + "\n")
        return True


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
