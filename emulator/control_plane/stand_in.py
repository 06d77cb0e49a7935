"""A small model stands in for the one that an endpoint asks for, on a machine that cannot load that one.

The endpoint's variables stay as they are in the API. A worker gets the small model under the name that the endpoint
asks for, and none of the variables that are about the other model's files or about GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_MODEL, _SERVED_NAME = "MODEL_NAME", "SERVED_MODEL_NAME"
TINY_MODEL_VARIABLES: Final = {
    _SERVED_NAME: "tiny",
    "TOOL_CALL_PARSER": "hermes",
    "ENABLE_AUTO_TOOL_CHOICE": "true",
}
"""The tiny model's name, and what it needs for tool calls."""
_OF_THE_OTHER_MODEL: Final = frozenset(
    {
        "MODEL_REVISION",
        "REVISION",
        "TOKENIZER",
        "TOKENIZER_NAME",
        "TOKENIZER_MODE",
        "TOKENIZER_REVISION",
        "HF_CONFIG_PATH",
        "HF_OVERRIDES",
        "QUANTIZATION",
        "LOAD_FORMAT",
        "DTYPE",
        "KV_CACHE_DTYPE",
        "MAX_MODEL_LEN",
        "MAX_NUM_BATCHED_TOKENS",
        "TENSOR_PARALLEL_SIZE",
        "PIPELINE_PARALLEL_SIZE",
        "ENABLE_EXPERT_PARALLEL",
        "GPU_MEMORY_UTILIZATION",
        "CPU_OFFLOAD_GB",
        "SPECULATIVE_CONFIG",
        "ENABLE_LORA",
        "LORA_MODULES",
        "CHAT_TEMPLATE",
        "CUSTOM_CHAT_TEMPLATE",
        "REASONING_PARSER",
        "TOOL_CALL_PARSER",
        "VLLM_CONFIG_FILE",
        "VLLM_EXTRA_ARGS",
    }
)


def stand_in(env: Mapping[str, str], model_dir: str) -> tuple[dict[str, str], str]:
    """Return a worker's variables with the small model, and a line for its log that says so.

    Args:
        env: the endpoint's variables.
        model_dir: directory of the small model.
    """
    asked = env.get(_MODEL)
    left_out = sorted(_OF_THE_OTHER_MODEL & env.keys())
    kept = {name: value for name, value in env.items() if name not in left_out}
    named = {_SERVED_NAME: asked} if asked else {}
    result = {**TINY_MODEL_VARIABLES, **named, **kept, _MODEL: model_dir}
    without = f"; left out: {', '.join(left_out)}" if left_out else ""
    model = asked or "the image's model"
    return result, f"{model} is not loaded: a tiny model answers as {result[_SERVED_NAME]}{without}"
