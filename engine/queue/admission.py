"""How many jobs to take now: what the engine can start at once and bring to its end, and no more.

What it cannot start belongs in the queue, where the platform counts it and another worker can take it.
"""

from __future__ import annotations

from typing import Protocol

# With less of the KV cache free than this, new requests make running ones give way.
FULL = 0.9


class Load(Protocol):
    """What the engine last said of itself, and what its requests have been like; sizes in tokens."""

    usual_prompt_tokens: float
    usual_answer_tokens: float

    @property
    def running(self) -> int:
        """Requests that run."""

    @property
    def waiting(self) -> int:
        """Requests that wait for the engine."""

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache that is taken, from 0 to 1."""

    @property
    def answered_tokens(self) -> float:
        """What the requests that run have been answered so far, on average."""


class Admission:
    """Answers one question, from the engine's statistics.

    Args:
        load: the engine's statistics, kept up to date by it.
        limit: most jobs at once.
        cache_tokens: so many tokens fit the KV cache.
        longest_tokens: the longest request that the engine takes. A cache that does not hold one is not what bounds the
            engine: a model that only embeds or ranks has none to speak of.
    """

    def __init__(self, load: Load, limit: int, cache_tokens: int, longest_tokens: int = 0) -> None:
        self._load = load
        self._limit = limit
        self._cache_tokens = cache_tokens
        self._cached = cache_tokens >= longest_tokens

    def room(self, held: int) -> int:
        """How many more jobs to take while `held` are held; an idle worker always has room for one."""
        # Statistics come with steps: without a job there is none, and the last ones are old.
        if held and (self._load.waiting or (self._cached and self._load.kv_cache_usage >= FULL)):
            return 0
        if not self._cached:
            return max(self._limit - held, 0)
        # Cut before it is rounded: beside a tiny size, what fits has no bounds.
        fitting = min(FULL * self._cache_tokens / max(self._size_tokens(held), 1), self._limit)
        return max(int(max(fitting, 1)) - held, 0)

    def _size_tokens(self, held: int) -> float:
        """What a request takes up, on average, while it runs.

        Its prompt and half of its answer: requests of mixed ages have half on average, and what ends makes room for
        what grows. Those that run say it themselves, but while they are younger than that, as all are after a burst.
        """
        load = self._load
        half = load.usual_answer_tokens / 2
        if not (held and load.running):
            return load.usual_prompt_tokens + half
        each = load.kv_cache_usage * self._cache_tokens / load.running
        return each + max(half - load.answered_tokens, 0)
