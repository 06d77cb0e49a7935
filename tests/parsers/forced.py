"""A logits processor of vLLM that lets a request say which tokens it is answered with.

It says so in its `vllm_xargs`, as `token_ids`; or, where it is to have no such field, by a `seed` that stands in the
file of answers in the model's directory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

ANSWERS = "answers.json"
FAR_ABOVE = 100.0


class Forced(AdapterLogitsProcessor):  # type: ignore[misc]  # vLLM is not typed for --strict
    """Leaves each request no other next token than the one that it asks for; the last one again and again.

    What the model makes of it counts for nothing: all other tokens get what does not depend on the batch either.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        answers = Path(vllm_config.model_config.model) / ANSWERS
        self._answers: dict[str, list[int]] = json.loads(answers.read_text(encoding="utf-8"))

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Any], Any] | None:
        token_ids = (params.extra_args or {}).get("token_ids") or self._answers.get(str(params.seed))
        if token_ids is None:
            return None

        def force(answered: list[int], logits: Any) -> Any:
            forced = int(token_ids[min(len(answered), len(token_ids) - 1)])
            torch.arange(0, -len(logits), -1, out=logits)
            logits[forced] = FAR_ABOVE
            return logits

        return force
