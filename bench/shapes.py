"""Models with the shapes of real ones and made-up weights, for `python -m bench gpu`.

Speed and memory depend on the shape, not on the values of weights. Texts are noise, but every token has text: the
tokenizer is the tiny model's, whose vocabulary is filled up with words.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.four_bits import QUANTIZATION
from bench.synthetic_model import TOKENIZER_FILES

# Of the tokenizer and the messages' format, which all models share.
_VOCABULARY = "tokenizer.json"


@dataclass(frozen=True)
class Shape:
    """The sizes that a model's speed depends on, by their names in `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int


# A Llama of 3.6 billion parameters: Llama 3.2 3B's, with a head of its own.
LLAMA_3B = Shape(3072, 8192, 28, 24, 8, 128256, 8192)
PHI_4 = Shape(5120, 17920, 40, 40, 10, 100352, 16384)
# For a rehearsal on a CPU. The vocabulary must have room for the tiny model's 1024 tokens.
SMALL = Shape(128, 256, 2, 4, 2, 2048, 2048)


def make_llama(tiny: Path, directory: Path, shape: Shape) -> Path:
    """Make a Llama without weights, which vLLM makes up (`--load-format dummy`); return the directory."""
    return _make(tiny, directory, shape, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})


def make_phi_in_4_bits(tiny: Path, directory: Path, shape: Shape) -> Path:
    """Make a Phi in 4 bits, which needs weights (`bench.four_bits`); return the directory."""
    return _make(tiny, directory, shape, {"quantization_config": QUANTIZATION})


def _make(tiny: Path, directory: Path, shape: Shape, changes: Mapping[str, Any]) -> Path:
    """Write everything but weights: the tiny model's files, with another shape and these changes of `config.json`."""
    directory.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tiny / name, directory / name)
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    config |= {**vars(shape), "original_max_position_embeddings": shape.max_position_embeddings, **changes}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = json.loads((tiny / _VOCABULARY).read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    # Ġ is a space, as byte-level tokenizers write it.
    vocabulary |= {f"Ġw{number}": number for number in range(len(vocabulary), shape.vocab_size)}
    (directory / _VOCABULARY).write_text(json.dumps(tokenizer), encoding="utf-8")
    return directory
