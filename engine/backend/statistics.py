"""What the engine last said of itself, and what its requests have been like; sizes in tokens, times in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

# So many of the last requests say what one is like.
REMEMBERED = 16
# Requests that nobody asks about, as under the SDK's own loop, do not gather for good.
FINISHED_KEPT = 4096


@dataclass(slots=True)
class EngineLoad:
    """What one engine said at its last step (vLLM's `SchedulerStats`); there are several where data is parallel."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of its KV cache that is taken, from 0 to 1."""
    stepped_at: float = 0.0
    step_s: float = 0.0
    """What a step takes while requests run, on average, the last ones counting most."""


@dataclass(slots=True)
class Statistics:
    """The sum of what the engines say, kept apart by engine: each reports its own load alone.

    Args:
        answer_tokens: how many tokens the requests that run have been answered so far, in all. It is asked for when it
            is needed: a sum kept here would count requests that were aborted, of which vLLM reports no end.
    """

    answer_tokens: Callable[[], int] = lambda: 0
    engines: dict[int, EngineLoad] = field(default_factory=dict)
    generation_tokens: int = 0
    usual_prompt_tokens: float = 512.0
    usual_answer_tokens: float = 512.0
    """What requests that have finished had, on average, the last ones counting most; at first a guess."""
    finished: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Tokens in and out of requests that have finished, until they are asked for."""
    changed: Callable[[], None] = lambda: None
    """Called at each step."""

    @property
    def running(self) -> int:
        """Requests that run, on all engines."""
        return sum(engine.running for engine in self.engines.values())

    @property
    def waiting(self) -> int:
        """Requests that wait for an engine that has them, on all engines."""
        return sum(engine.waiting for engine in self.engines.values())

    @property
    def kv_cache_usage(self) -> float:
        """Share of all engines' KV caches that is taken: they are of one size."""
        return sum(engine.kv_cache_usage for engine in self.engines.values()) / max(len(self.engines), 1)

    @property
    def stepped_at(self) -> float:
        """When an engine last made a step, by `time.monotonic()`; 0 before the first."""
        return max((engine.stepped_at for engine in self.engines.values()), default=0.0)

    @property
    def step_s(self) -> float:
        """What a step takes on the slowest engine that runs requests."""
        return max((engine.step_s for engine in self.engines.values()), default=0.0)

    @property
    def answered_tokens(self) -> float:
        """What the requests that run have been answered so far, on average."""
        running = self.running
        return self.answer_tokens() / running if running else 0.0

    def step(self, index: int) -> None:
        """An engine has made a step."""
        engine = self._engine(index)
        now = time.monotonic()
        if engine.running:
            engine.step_s += (now - engine.stepped_at - engine.step_s) / REMEMBERED
        engine.stepped_at = now

    def load(self, index: int, running: int, waiting: int, kv_cache_usage: float) -> None:
        """What an engine has to do from now on."""
        engine = self._engine(index)
        engine.running, engine.waiting, engine.kv_cache_usage = running, waiting, kv_cache_usage

    def finish(self, request_id: str, prompt_tokens: int, answer_tokens: int) -> None:
        """A request has finished, with so many tokens."""
        self.usual_prompt_tokens += (prompt_tokens - self.usual_prompt_tokens) / REMEMBERED
        self.usual_answer_tokens += (answer_tokens - self.usual_answer_tokens) / REMEMBERED
        self.finished[request_id] = (prompt_tokens, answer_tokens)
        if len(self.finished) > FINISHED_KEPT:
            del self.finished[next(iter(self.finished))]

    def _engine(self, index: int) -> EngineLoad:
        if index not in self.engines:
            self.engines[index] = EngineLoad()
        return self.engines[index]
