"""Why the engine does not start, in one line that a person can act on.

What goes wrong in vLLM's engine process is told to the worker as "see above" alone. So that process notes what it logs
as an error in a file that both know, and the worker reads it there.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FILE = "VLLM_SERVERLESS_START_ERRORS"
# Who logs why the engine's process, or one of its workers, could not start (vLLM 0.32).
_LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
_LENGTH = 300

# What a message of vLLM, the hub's client or torch stands for: the first that matches is told.
_CAUSES: tuple[tuple[str, str], ...] = (
    (r"estimated maximum model length is (\d+)", "there is not enough memory for MAX_MODEL_LEN: set it to {0} or less"),
    (
        r"(?:To serve at least one request|No available memory for the cache)",
        "there is not enough memory for the KV cache: set a smaller MAX_MODEL_LEN or a larger GPU_MEMORY_UTILIZATION",
    ),
    (
        r"(?:OutOfMemoryError|out of memory|less than (?:desired|requested)[^.]*memory)",
        "there is not enough memory: set another GPU_MEMORY_UTILIZATION, a smaller MAX_MODEL_LEN, or take a larger GPU",
    ),
    (
        r"max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)",
        "MAX_MODEL_LEN is {0}, and the model's greatest length is {1}",
    ),
    (
        r"(?:GatedRepoError|gated repo)",
        "{model} is gated: ask for access on its page, and set HF_TOKEN to a token of that account",
    ),
    (r"(?:RevisionNotFoundError|Invalid rev id)", "{model} has no such revision: check MODEL_REVISION"),
    (
        r"(?:RepositoryNotFoundError|is not a valid model identifier|Repo id must)",
        "there is no model {model}: check MODEL_NAME; a private model needs HF_TOKEN too",
    ),
    (
        r"(?:couldn't connect to|LocalEntryNotFoundError|offline mode)",
        "the hub cannot be reached, and {model} is not on this machine",
    ),
    (
        r"'_OpNamespace' '_C' object has no attribute",
        "vLLM's kernels cannot be loaded: a library is missing (on a CPU: libnuma1) or the driver is too old",
    ),
    (r"No space left on device", "the disk is full: use a larger disk or a network volume"),
    (
        r"(?:does not appear to have a file named|Can't load the configuration)",
        "{model} is not whole, or no model at all",
    ),
)


def note_errors() -> None:
    """Let this process note, for the worker to read, why the engine does not start."""
    path = os.environ.get(_FILE)
    if path is not None:
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_Note(Path(path)))


class _Note(logging.Filter):
    """Writes errors down as they pass. Not a handler: vLLM sets up its logging anew and takes handlers away."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR and self._path.parent.is_dir():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{logging.Formatter().format(record)}\n")
        return True


@contextmanager
def noted_errors() -> Iterator[Path]:
    """The file where the engine's processes note their errors, while they start."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "errors"
        os.environ[_FILE] = str(path)
        note_errors()
        try:
            yield path
        finally:
            del os.environ[_FILE]


def explain(error: BaseException, noted: Path, model: str) -> str:
    """Why the engine does not start.

    Args:
        error: what it was told here.
        noted: the file of what its processes noted.
        model: the model's name or path.
    """
    texts = [noted.read_text(encoding="utf-8", errors="replace")] if noted.exists() else []
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            texts.append("No space left on device")
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    for pattern, told in _CAUSES:
        for text in texts:
            if found := re.search(pattern, text):
                return told.format(*found.groups(), model=model)
    return _first_error(texts[0])


def _first_error(text: str) -> str:
    """The first exception's message in a text, shortened: what follows from it, and what pydantic adds, is left out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("Value error, ")]
    errors = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception): ", line)]
    told = next(iter([*reasons, *errors, *lines[-1:]]), "no reason given")
    return re.sub(r" \[type=.*", "", told.removeprefix("Value error, "))[:_LENGTH]
