"""A synthetic model of over 1 GB: the tiny model's architecture and tokenizer, wider and deeper, with random weights.

Its output is noise, but its load time is realistic. It is generated once per machine, in the tiny model's cache.
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
from builder.layout import cache_root
from builder.tiny_model.cache import cached, key_of

_HIDDEN, _INTERMEDIATE, _LAYERS = 2048, 8192, 9
_HEADS, _KV_HEADS = 16, 4
_SHARDS = 4
SCALE = 0.02
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

_Shapes = dict[str, tuple[int, ...]]


def synthetic_model() -> Path:
    """Return the model's directory; generating it the first time takes a few seconds and 1.1 GB of disk space."""
    tiny = tiny_model()
    key = key_of((Path(__file__),), {"tiny": tiny.name})
    return cached(cache_root() / "synthetic", key, lambda directory: _generate(tiny, directory))


def _generate(tiny: Path, directory: Path) -> None:
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
    }
    write_weights(tensor_shapes(config), directory)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tiny / name, directory / name)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tensor_shapes(config: dict[str, Any]) -> _Shapes:
    """Return the shapes of a `Phi3ForCausalLM`'s tensors by name."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    shapes: _Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.qkv_proj.weight": (hidden + 2 * config["num_key_value_heads"] * head, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_up_proj.weight": (2 * intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def write_weights(shapes: _Shapes, directory: Path) -> None:
    """Write random bfloat16 tensors of these shapes to several files of about the same size, and their index."""
    total_bytes = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    rng = np.random.default_rng(0)
    index: dict[str, str] = {}
    for number, names in enumerate(_shards(shapes, total_bytes / _SHARDS), start=1):
        file = f"model-{number:05d}.safetensors"
        tensors = {name: _random_tensor(shapes[name], rng) for name in names}
        # Each spec points into its array, which must stay alive until the file is written.
        specs = {
            name: TensorSpec(dtype="bfloat16", shape=shapes[name], data_ptr=tensor.ctypes.data, data_len=tensor.nbytes)
            for name, tensor in tensors.items()
        }
        serialize_file(specs, str(directory / file), metadata={"format": "pt"})
        (directory / file).chmod(0o644)
        index |= dict.fromkeys(names, file)
    document = {"metadata": {"total_size": total_bytes}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _shards(shapes: _Shapes, shard_bytes: float) -> Iterator[list[str]]:
    """Yield the tensor names of each shard, in order; a shard is closed once it holds `shard_bytes`."""
    names: list[str] = []
    size_bytes = 0
    for name, shape in shapes.items():
        names.append(name)
        size_bytes += 2 * int(np.prod(shape))
        if size_bytes >= shard_bytes:
            yield names
            names, size_bytes = [], 0
    if names:
        yield names


def _random_tensor(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint16]:
    """Return a bfloat16 tensor's bits, the upper half of a float32's: ones for norms, otherwise small random values."""
    values = np.ones(shape, np.float32) if len(shape) == 1 else SCALE * rng.standard_normal(shape, np.float32)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
