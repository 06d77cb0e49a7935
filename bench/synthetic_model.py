"""A model of over 1 GB with made-up weights: the tiny model's architecture and tokenizer, wider and deeper.

What it says is noise; how long it takes to load is not. Made once a machine, in the cache where the tiny model lies.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file

from bench.systems import tiny_model
from builder.tiny_model.cache import cache_root, cached, key_of

_HIDDEN, _INTERMEDIATE, _LAYERS = 2048, 8192, 9
_HEADS, _KV_HEADS = 16, 4
_SHARDS = 4
_SCALE = 0.02
_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

_Shapes = dict[str, tuple[int, ...]]


def made_up_model() -> Path:
    """Return where the model lies; its first making takes some seconds and 1.1 GB."""
    tiny = Path(tiny_model())
    return cached(cache_root() / "made-up", key_of((Path(__file__),), {"tiny": tiny.name}), lambda to: _make(tiny, to))


def _make(tiny: Path, directory: Path) -> None:
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
    }
    write_weights(shapes(config), directory)
    for name in _COPIED:
        shutil.copyfile(tiny / name, directory / name)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def shapes(config: dict[str, Any]) -> _Shapes:
    """The tensors of a `Phi3ForCausalLM`, by their names."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    found: _Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        found |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.qkv_proj.weight": (hidden + 2 * config["num_key_value_heads"] * head, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_up_proj.weight": (2 * intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def write_weights(wanted: _Shapes, directory: Path) -> None:
    """Write made-up bfloat16 tensors of these shapes in several files of about the same size, and their index."""
    total_bytes = sum(2 * int(np.prod(shape)) for shape in wanted.values())
    chance = np.random.default_rng(0)
    index: dict[str, str] = {}
    for number, names in enumerate(_shards(wanted, total_bytes / _SHARDS), start=1):
        file = f"model-{number:05d}.safetensors"
        tensors = {name: _tensor(wanted[name], chance) for name in names}
        # Each spec points into its array, which has to live until the file is written.
        specs = {
            name: TensorSpec(dtype="bfloat16", shape=wanted[name], data_ptr=tensor.ctypes.data, data_len=tensor.nbytes)
            for name, tensor in tensors.items()
        }
        serialize_file(specs, str(directory / file), metadata={"format": "pt"})
        (directory / file).chmod(0o644)
        index |= dict.fromkeys(names, file)
    document = {"metadata": {"total_size": total_bytes}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _shards(wanted: _Shapes, shard_bytes: float) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in wanted.items():
        names.append(name)
        filled += 2 * int(np.prod(shape))
        if filled >= shard_bytes:
            yield names
            names, filled = [], 0
    if names:
        yield names


def _tensor(shape: tuple[int, ...], chance: np.random.Generator) -> NDArray[np.uint16]:
    """The bits of a made-up bfloat16 tensor, which are the upper half of a float32: ones for norms, else small."""
    values = np.ones(shape, np.float32) if len(shape) == 1 else _SCALE * chance.standard_normal(shape, np.float32)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
