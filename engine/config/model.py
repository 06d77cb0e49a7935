"""The model to serve."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """The model to serve.

    Attributes:
        path: the directory, hub id or URL that vLLM loads.
        names: the names that requests may use; responses carry the first.
        to_download: its hub id and revision, if it must be downloaded to `path` first.
    """

    path: str
    names: tuple[str, ...]
    to_download: tuple[str, str | None] | None = None
