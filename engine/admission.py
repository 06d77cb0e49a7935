"""How many jobs to take now: what the engine can start at once, and no more.

What it cannot start belongs in the queue, where the platform counts it and another worker can take it.
"""

from __future__ import annotations

from typing import Protocol

# With less of the KV cache free than this, new requests make running ones give way.
FULL = 0.9


class Load(Protocol):
    """What the engine last said of itself."""

    running: int
    waiting: int
    kv_cache_usage: float
    steps: int


class Admission:
    """Answers one question, from the engine's statistics.

    Args:
        load: the engine's statistics, kept up to date by it.
        limit: most jobs at once.
        surely: so many requests fit the KV cache at their greatest length.
    """

    def __init__(self, load: Load, limit: int, surely: int) -> None:
        self._load = load
        self._limit = limit
        self._surely = max(surely, 1)
        self._steps_at_take = -1

    def taken(self) -> None:
        """Jobs have been taken: what the engine said before does not count them."""
        self._steps_at_take = self._load.steps

    def room(self, held: int) -> int:
        """How many more jobs to take while `held` are held.

        Up to what surely fits, all at once. Beyond that by what the cache has left at what a request uses now, at most
        as many again as there are, and only when the engine has made a step with the last ones.
        """
        free = self._limit - held
        if free <= 0:
            return 0
        if held < self._surely:
            return 0 if self._full(held) else min(free, self._surely - held)
        load = self._load
        if self._full(held) or load.steps == self._steps_at_take or not load.running:
            return 0
        each = load.kv_cache_usage / load.running
        spare = (FULL - load.kv_cache_usage) / each if each else held
        # Cut after the least is found: beside a tiny use, what is left over is infinite.
        return int(min(free, held, spare))

    def _full(self, held: int) -> bool:
        # Statistics come with steps: without a job there is none, and the last ones are old.
        return held > 0 and (self._load.waiting > 0 or self._load.kv_cache_usage >= FULL)
