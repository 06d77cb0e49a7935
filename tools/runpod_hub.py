"""What RunPod's hub offers to set, made from the settings' declarations and from vLLM's parser.

    python -m tools.runpod_hub .runpod/hub.json [--icon-url URL] [--load-balancer]

The form is that of the hub's publishing guide (https://docs.runpod.io/hub/publishing-guide). A listing is for one type
of endpoint: a queue, or with `endpointType` a load balancer, for which a repository of its own is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from engine.config.settings import Settings, is_secret
from engine.config.vllm_flags import Flags
from engine.config.worker_vllm import ALIASES

# Of vLLM's flags the most used; vLLM's parser knows their kinds and choices, but describes them only to `--help`.
FLAGS = {
    "MODEL_NAME": "Hub id or directory of the model. Without it: the model in the image.",
    "MODEL_REVISION": "Branch, tag or commit of the model.",
    "SERVED_MODEL_NAME": "Names that requests may use for the model, comma-separated; responses report the first.",
    "MAX_MODEL_LEN": "Maximum context length (prompt plus output) in tokens: 8192, 16k, or auto for what fits.",
    "QUANTIZATION": "How the weights are quantized: awq, bitsandbytes, fp8, … Usually detected from the model.",
    "DTYPE": "Data type of weights and activations.",
    "GPU_MEMORY_UTILIZATION": "Share of the GPU's memory that vLLM uses, above 0 and at most 1.",
    "TENSOR_PARALLEL_SIZE": "Number of GPUs to split the model across.",
    "MAX_NUM_SEQS": "Maximum number of concurrent requests.",
    "ENFORCE_EAGER": "Skip compilation: slower tokens, faster start.",
    "TOOL_CALL_PARSER": "Parser for the model's tool calls; also set ENABLE_AUTO_TOOL_CHOICE.",
    "ENABLE_AUTO_TOOL_CHOICE": "Let the model decide when to call tools.",
    "REASONING_PARSER": "Parser for the model's reasoning output: qwen3, deepseek_r1, …",
}
# What is not hidden among the advanced ones.
BASIC = {"MODEL_NAME", "MAX_MODEL_LEN", "QUANTIZATION", "SERVED_MODEL_NAME"}

LISTING = {
    "title": "vLLM, in process",
    "description": "Any LLM behind an OpenAI-compatible endpoint: vLLM 0.32 inside the worker.",
    "type": "serverless",
    "category": "language",
}
MACHINE: dict[str, Any] = {
    "runsOn": "GPU",
    "containerDiskInGb": 100,
    "gpuIds": "ADA_24,AMPERE_24,AMPERE_48,ADA_48_PRO",
    "gpuCount": 1,
    # What vLLM 0.32's wheels are built with.
    "allowedCudaVersions": ["13.0"],
}

# What the form offers to begin with; the keys are those of its inputs.
PRESETS: list[dict[str, Any]] = [
    {
        "name": "phi-4 in 4 bits, 24 GB",
        "defaults": {
            "MODEL_NAME": "unsloth/phi-4-bnb-4bit",
            "QUANTIZATION": "bitsandbytes",
            "DTYPE": "bfloat16",
            "MAX_MODEL_LEN": "8192",
            "SERVED_MODEL_NAME": "phi-4",
        },
    },
    {
        "name": "Reasoning and tool calls, 24 GB",
        "defaults": {
            "MODEL_NAME": "Qwen/Qwen3-8B",
            "MAX_MODEL_LEN": "16384",
            "ENABLE_AUTO_TOOL_CHOICE": True,
            "TOOL_CALL_PARSER": "hermes",
            "REASONING_PARSER": "qwen3",
        },
    },
    {"name": "Embeddings", "defaults": {"MODEL_NAME": "BAAI/bge-m3"}},
    {"name": "Quick cold start, slower tokens", "defaults": {"ENFORCE_EAGER": True}},
]
# What a worker needs behind a load balancer, and where the balancer finds it.
LOAD_BALANCER = {"ENDPOINT_TYPE": "load_balancer", "PORT": "8080", "PORT_HEALTH": "8080"}

_NOT_OFFERED = ("baked_", "bucket_", "compile_cache_dir", "ease_", "listen_host", "platform", "runpod_", "spirit_")
_UNITS = {"_S": " (seconds)", "_MS": " (milliseconds)"}
_SPELLING = {"Vllm": "vLLM", "Gpu": "GPU", "Dtype": "Data type"}


def document(flags: Flags, icon_url: str | None = None, *, load_balancer: bool = False) -> dict[str, Any]:
    """Return the whole of `hub.json`.

    Args:
        flags: vLLM's.
        icon_url: of the listing's icon.
        load_balancer: for load-balancing endpoints, not queues.
    """
    inputs = [*flag_inputs(flags), *setting_inputs()]
    machine = MACHINE
    if load_balancer:
        machine = {**MACHINE, "endpointType": "LB"}
        fixed = [{"key": name, "value": value} for name, value in LOAD_BALANCER.items()]
        inputs = fixed + [one for one in inputs if one["key"] not in LOAD_BALANCER]
    icon = {} if icon_url is None else {"iconUrl": icon_url}
    return {**LISTING, **icon, "config": {**machine, "presets": PRESETS, "env": inputs}}


def setting_inputs() -> list[dict[str, Any]]:
    """The worker's own settings, as inputs of the hub's form.

    Left out are secrets, which the form would show (they belong in the platform's secrets, or are set by the platform
    itself), what the image was built with, which an empty input of the form would hide, and what is for another
    platform.
    """
    properties = Settings.model_json_schema()["properties"]
    return [
        _input(name.upper(), schema["description"], _kind(schema), schema.get("default"))
        for name, schema in properties.items()
        if not is_secret(name) and not name.startswith(_NOT_OFFERED)
    ]


def flag_inputs(flags: Flags) -> list[dict[str, Any]]:
    """The most used flags of vLLM, as inputs of the hub's form.

    Only booleans have a default, as a switch is on or off: what is not set is the image's, or else vLLM's.
    """
    return [_flag_input(name, flags.actions[ALIASES.get(name, name.lower())]) for name in FLAGS]


def _flag_input(name: str, action: argparse.Action) -> dict[str, Any]:
    if name == "MODEL_NAME":
        return _input(name, FLAGS[name], {"type": "huggingface"}, None)
    if action.nargs == 0:
        return _input(name, FLAGS[name], _BOOLEAN, default=bool(action.default))
    said = "" if action.default in (None, "") else f" vLLM's default: {action.default}."
    if action.type in (int, float):
        return _input(name, FLAGS[name] + said, {"type": "number"}, None)
    choices = action.choices or _named_in(action.metavar)
    if not choices:
        return _input(name, FLAGS[name] + said, {"type": "string"}, None)
    options = [{"label": "not set", "value": ""}, *({"label": choice, "value": choice} for choice in choices)]
    return _input(name, FLAGS[name] + said, {"type": "string", "options": options}, "")


_BOOLEAN = {"type": "boolean", "trueValue": "true", "falseValue": "false"}


def _named_in(metavar: object) -> list[str]:
    """The choices of a flag that takes others too, `{a,b} or …`: vLLM names them there alone."""
    match = re.match(r"\{(.+?)\}", metavar) if isinstance(metavar, str) else None
    return match[1].split(",") if match else []


def _kind(schema: dict[str, Any]) -> dict[str, Any]:
    """The hub's type for a setting, with its bounds; what may be a number or a word is text."""
    kinds = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    if len(kinds) > 1 or kinds[0]["type"] in ("string", "array"):
        return {"type": "string"}
    (kind,) = kinds
    if kind["type"] == "boolean":
        return _BOOLEAN
    least = kind.get("minimum", math.floor(kind["exclusiveMinimum"]) + 1 if "exclusiveMinimum" in kind else None)
    bounds = {"min": least, "max": kind.get("maximum")}
    return {"type": "number"} | {name: bound for name, bound in bounds.items() if bound is not None}


def _input(name: str, description: str, kind: dict[str, Any], default: object) -> dict[str, Any]:
    told = {"name": _label(name), **kind, "description": description.replace("`", "")}
    if default is not None and default != []:
        told["default"] = default
    return {"key": name, "input": {**told, "advanced": name not in BASIC}}


def _label(name: str) -> str:
    """The name as words: `Drain timeout (seconds)`."""
    unit = next((unit for unit in _UNITS if name.endswith(unit)), "")
    first, *rest = name.removesuffix(unit).capitalize().split("_")
    return " ".join([_SPELLING.get(first, first), *rest]) + _UNITS.get(unit, "")


def main() -> None:
    """Write the file that the command line names."""
    from engine.backend import vllm_args

    parser = argparse.ArgumentParser(description="Write RunPod Hub's hub.json.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--icon-url", metavar="URL", help="of the listing's icon")
    parser.add_argument("--load-balancer", action="store_true", help="for load-balancing endpoints, not queues")
    arguments = parser.parse_args()
    made = document(vllm_args.flags(), arguments.icon_url, load_balancer=arguments.load_balancer)
    arguments.file.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
