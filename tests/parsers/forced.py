"""A vLLM logits processor with which a request determines the tokens of its answer.

It gives them in its `vllm_xargs`, as `token_ids`. If it must not have that field, its `seed` selects an answer from a
file in the model's directory. With `step_ms` as well, each token takes so many milliseconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

ANSWERS = "answers.json"
FAR_ABOVE = 100.0


class Forced(AdapterLogitsProcessor):  # type: ignore[misc]  # vLLM is not typed for --strict
    """Forces the next token of each request; after the last one, that one is repeated.

    All other tokens get fixed logits, so that log-probabilities do not depend on the batch.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        answers = Path(vllm_config.model_config.model) / ANSWERS
        self._answers: dict[str, list[int]] = json.loads(answers.read_text(encoding="utf-8"))

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Any], Any] | None:
        arguments = params.extra_args or {}
        token_ids = arguments.get("token_ids") or self._answers.get(str(params.seed))
        step_s = arguments.get("step_ms", 0) / 1000
        if token_ids is None:
            return None

        def force(output_ids: list[int], logits: Any) -> Any:
            time.sleep(step_s)
            forced = int(token_ids[min(len(output_ids), len(token_ids) - 1)])
            torch.arange(0, -len(logits), -1, out=logits)
            logits[forced] = FAR_ABOVE
            return logits

        return force
