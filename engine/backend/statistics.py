"""The engine's load at its last step, and averages over its requests. Sizes in tokens, times in seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.run_clock import CLOCK

# Window of the exponential moving averages, in requests or steps.
EMA_WINDOW = 16
# Under the SDK's own loop nobody asks for finished requests: they must not accumulate.
MAX_FINISHED_ENTRIES = 4096


@dataclass(slots=True)
class EngineStep:
    """What one engine reported at its last step (vLLM's `SchedulerStats`); data parallelism has several engines."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of its KV cache in use, from 0 to 1."""
    stepped_at: float = 0.0
    step_s: float = 0.0
    """Moving average of the duration of a step while requests run."""


@dataclass(slots=True)
class Statistics:
    """Sums over the engines, kept per engine, as each reports its own load only.

    Args:
        output_tokens: returns how many output tokens the running requests have so far, in total. It is computed when
            needed: a sum kept here would include aborted requests, whose end vLLM does not report.

    Attributes:
        changed: is set at each step of an engine.
        finished: tokens in and out of finished requests, by request id, until `VLLMEngine.pop_token_counts`.
    """

    output_tokens: Callable[[], int] = lambda: 0
    engines: dict[int, EngineStep] = field(default_factory=dict)
    generation_tokens: int = 0
    avg_prompt_tokens: float = 512.0
    avg_output_tokens: float = 512.0
    """Moving averages over finished requests, first a guess."""
    finished: dict[str, tuple[int, int]] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def running(self) -> int:
        """Running requests, on all engines."""
        return sum(engine.running for engine in self.engines.values())

    @property
    def waiting(self) -> int:
        """Requests that wait in an engine, on all engines."""
        return sum(engine.waiting for engine in self.engines.values())

    @property
    def kv_cache_usage(self) -> float:
        """Share of all engines' KV caches in use; the caches are of one size."""
        return sum(engine.kv_cache_usage for engine in self.engines.values()) / max(len(self.engines), 1)

    @property
    def stepped_at(self) -> float:
        """When an engine last made a step, by `engine.run_clock`; 0 before the first."""
        return max((engine.stepped_at for engine in self.engines.values()), default=0.0)

    @property
    def step_s(self) -> float:
        """Duration of a step on the slowest engine."""
        return max((engine.step_s for engine in self.engines.values()), default=0.0)

    @property
    def avg_running_output_tokens(self) -> float:
        """Output tokens that the running requests have so far, on average."""
        running = self.running
        return self.output_tokens() / running if running else 0.0

    def on_step(self, index: int) -> None:
        """Record that an engine has made a step."""
        engine = self._engine(index)
        now = CLOCK.now()
        if engine.running:
            engine.step_s += (now - engine.stepped_at - engine.step_s) / EMA_WINDOW
        engine.stepped_at = now

    def on_scheduler_stats(self, index: int, running: int, waiting: int, kv_cache_usage: float) -> None:
        """Record an engine's load."""
        engine = self._engine(index)
        engine.running, engine.waiting, engine.kv_cache_usage = running, waiting, kv_cache_usage

    def on_finished(self, request_id: str, prompt_tokens: int, output_tokens: int) -> None:
        """Record that a request has finished."""
        self.avg_prompt_tokens += (prompt_tokens - self.avg_prompt_tokens) / EMA_WINDOW
        self.avg_output_tokens += (output_tokens - self.avg_output_tokens) / EMA_WINDOW
        self.finished[request_id] = (prompt_tokens, output_tokens)
        if len(self.finished) > MAX_FINISHED_ENTRIES:
            del self.finished[next(iter(self.finished))]

    def _engine(self, index: int) -> EngineStep:
        if index not in self.engines:
            self.engines[index] = EngineStep()
        return self.engines[index]
