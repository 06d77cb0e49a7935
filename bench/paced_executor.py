"""A vLLM executor that takes a GPU's time for each step, on a machine without one: `--distributed-executor-backend`.

All else is vLLM's own: engine core, scheduler, API server. Instead of running the model, a step waits as long as one
on a GPU takes and returns a word for each request. So the load on everything around the model is that of a GPU, while
the processor has nothing to compute. The steps' durations are those of a model of 3 billion parameters on an H100,
measured as time between tokens (docs/performance.md).
"""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import ModelRunnerOutput

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

# Running requests, and how long a step takes then; between them, it is interpolated.
_RUNNING = (1, 64, 256)
_STEP_S = (0.0035, 0.0045, 0.012)


def step_s(running: int) -> float:
    """Return the duration of a step with this many requests, in seconds."""
    return float(np.interp(running, _RUNNING, _STEP_S))


class PacedExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM is not typed for --strict
    """Waits instead of running the model."""

    def _init_executor(self) -> None:
        super()._init_executor()
        document = json.loads((Path(self.model_config.tokenizer) / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"].items()
        self._words = sorted(number for token, number in vocabulary if token.isascii() and token.isalpha())
        self._prompt_tokens: dict[str, int] = {}
        self._steps = count()
        self._step_ends_at = 0.0

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Return one token for each request whose prompt is complete, when the step is over."""
        for request_id in scheduler_output.finished_req_ids:
            self._prompt_tokens.pop(request_id, None)
        scheduled = scheduler_output.num_scheduled_tokens
        known: dict[str, tuple[int, int]] = {}
        for new in scheduler_output.scheduled_new_reqs:
            self._prompt_tokens[new.req_id] = len(new.prompt_token_ids or ())
            known[new.req_id] = new.num_computed_tokens, 0
        cached = scheduler_output.scheduled_cached_reqs
        known |= zip(
            cached.req_ids, zip(cached.num_computed_tokens, cached.num_output_tokens, strict=True), strict=True
        )
        word = self._words[next(self._steps) % len(self._words)]
        sampled = [
            [word] if computed + scheduled[request_id] >= self._prompt_tokens[request_id] + outputs else []
            for request_id, (computed, outputs) in known.items()
        ]
        # On a GPU, the scheduler works while the model runs: its time is part of the step's.
        now = time.monotonic()
        duration_s = step_s(len(known))
        self._step_ends_at = min(max(self._step_ends_at + duration_s, now), now + duration_s)
        time.sleep(self._step_ends_at - now)
        output = ModelRunnerOutput(list(known), {name: index for index, name in enumerate(known)}, sampled)
        if not non_block:
            return output
        future: Future[ModelRunnerOutput] = Future()
        future.set_result(output)
        return future
