"""Decides how many jobs to take now: as many as the engine can start at once and complete.

Other jobs stay in the queue, where the platform counts them and another worker can take them.
"""

from __future__ import annotations

from typing import Protocol

from engine.telemetry.engine_load import EngineLoad

# Above this share of the KV cache, new requests cause preemptions of running ones.
KV_CACHE_HIGH_WATERMARK = 0.9


class RequestLoad(EngineLoad, Protocol):
    """The engine's load, and averages over its requests, in tokens."""

    avg_prompt_tokens: float
    avg_output_tokens: float

    @property
    def avg_running_output_tokens(self) -> float:
        """Output tokens that the running requests have so far, on average."""


class Admission:
    """Says how many more jobs to take.

    Args:
        load: the engine's statistics, which it keeps up to date.
        limit: most jobs at once.
        cache_tokens: capacity of the KV cache.
        max_model_len: the longest request that the engine accepts. A smaller KV cache does not limit the engine: it is
            that of a model that only embeds or ranks.
    """

    def __init__(self, load: RequestLoad, limit: int, cache_tokens: int, max_model_len: int = 0) -> None:
        self._load = load
        self._limit = limit
        self._cache_tokens = cache_tokens
        self._limited_by_kv_cache = cache_tokens >= max_model_len

    def available_slots(self, running: int) -> int:
        """Return how many more jobs to take while `running` are in progress; an idle worker can always take one."""
        # Statistics come with the engine's steps. Without a job there are none, and the last ones are outdated.
        if running and (
            self._load.waiting or (self._limited_by_kv_cache and self._load.kv_cache_usage >= KV_CACHE_HIGH_WATERMARK)
        ):
            return 0
        if not self._limited_by_kv_cache:
            return max(self._limit - running, 0)
        capacity_tokens = KV_CACHE_HIGH_WATERMARK * self._cache_tokens
        # The minimum comes before `int`: for a tiny request the quotient is huge.
        fitting = min(capacity_tokens / max(self._tokens_per_request(running), 1), self._limit)
        return max(int(max(fitting, 1)) - running, 0)

    def _tokens_per_request(self, running: int) -> float:
        """Estimate the KV cache that a request needs on average while it runs, in tokens.

        It is the prompt and half of the output: requests of mixed ages have half of their output on average, and those
        that end make room for those that grow. The running requests show their size themselves, except while they are
        younger than that, as all are after a burst.
        """
        load = self._load
        half_output = load.avg_output_tokens / 2
        if not (running and load.running):
            return load.avg_prompt_tokens + half_output
        each = load.kv_cache_usage * self._cache_tokens / load.running
        return each + max(half_output - load.avg_running_output_tokens, 0)
