"""Output and argument types that the commands share."""

from __future__ import annotations

import argparse
import re
import sys


def log(text: str) -> None:
    """Write a message to stderr."""
    sys.stderr.write(f"builder: {text}\n")
    sys.stderr.flush()


def positive_int(text: str) -> int:
    """Return the integer of an argument; raise ArgumentTypeError unless it is at least 1."""
    if not re.fullmatch(r"[0-9]+", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)
