"""Integers in query parameters, headers and variables."""

from __future__ import annotations

from typing import Final

# Python converts at most 4300 digits; the digits of the largest 64-bit integer are enough here.
_MAX_DIGITS: Final = 19


def parse_integer(text: str) -> int | None:
    """Return a non-negative integer of at most 19 decimal digits; None if the text is anything else."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else None
