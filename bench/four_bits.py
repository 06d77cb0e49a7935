"""Random weights in 4 bits, made on the spot: `python -m bench.four_bits DIRECTORY` adds them to a `config.json`.

bitsandbytes NF4 with double quantization, as in `unsloth/phi-4-bnb-4bit`: the linear layers are packed, each with its
quantization state; embedding, head and norms are unchanged. They are made on the GPU if there is one, in a process of
their own: it imports torch, and its GPU memory is free again afterwards.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bench.synthetic_model import SCALE, tensor_shapes
from bench.systems import ROOT

if TYPE_CHECKING:
    import torch

QUANTIZATION = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
"""The `quantization_config` of such a model."""

_FILE_BYTES = 2 << 30


def write_weights(directory: Path, timeout_s: float) -> None:
    """Add weights to the `config.json` in a directory, of a `Phi3ForCausalLM`.

    Raises:
        subprocess.CalledProcessError, subprocess.TimeoutExpired: they were not made; the first has what was printed.
    """
    command = [sys.executable, "-m", "bench.four_bits", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=timeout_s)


def packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a linear layer's weight in 4 bits and its quantization state, by the names of a checkpoint."""
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return {name: data} | {f"{name}.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}


def _main(directory: Path) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    for name, shape in tensor_shapes(json.loads((directory / "config.json").read_text(encoding="utf-8"))).items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            weight = SCALE * torch.randn(shape, dtype=torch.bfloat16, device=device)
            made = packed(name, weight) if name.startswith("model.layers.") else {name: weight}
            tensors |= {part: tensor.cpu() for part, tensor in made.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) >= _FILE_BYTES:
            _write(directory, tensors, index)
            tensors = {}
    _write(directory, tensors, index)
    document = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
    (directory / "model.safetensors.index.json").write_text(document + "\n", encoding="utf-8")


def _write(directory: Path, tensors: Mapping[str, torch.Tensor], index: dict[str, str]) -> None:
    """Write one more file of weights, and add its tensors to the index."""
    from safetensors.torch import save_file

    file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
    save_file(dict(tensors), directory / file, metadata={"format": "pt"})
    index |= dict.fromkeys(tensors, file)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
