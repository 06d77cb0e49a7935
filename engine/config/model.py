"""The model to serve."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """The model to serve.

    Attributes:
        path: where vLLM loads it from.
        names: that requests may use; the first is its own.
        to_download: its hub id and revision, while the directory does not hold it yet.
    """

    path: str
    names: tuple[str, ...]
    to_download: tuple[str, str | None] | None = None
