"""What the worker reads of the engine's load."""

from __future__ import annotations

from typing import Protocol


class EngineLoad(Protocol):
    """The engine's load at its last step."""

    @property
    def running(self) -> int:
        """Running requests."""

    @property
    def waiting(self) -> int:
        """Requests that wait in the engine."""

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache in use, from 0 to 1."""
