"""Errors of the advisor's inputs."""

from __future__ import annotations


class InputError(Exception):
    """A file or an option cannot be used; the message names it (and the line), and says what to do."""
