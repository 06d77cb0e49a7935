"""Output and argument types that the commands share."""

from __future__ import annotations

import sys


def log(text: str) -> None:
    """Write a message to stderr."""
    sys.stderr.write(f"builder: {text}\n")
    sys.stderr.flush()


def positive_int(text: str) -> int:
    """Return the integer, at least 1; raise ValueError for anything else."""
    number = int(text)
    if number < 1:
        raise ValueError(f"{text!r} is less than 1")
    return number
