"""Quantizes the tiny model to 4 bits, as the default model is: `python -m tests.quantized MODEL DIRECTORY`.

bitsandbytes NF4 with double quantization, as in `unsloth/phi-4-bnb-4bit`: the linear layers are packed, each with its
quantization state; embedding, head and norms are unchanged.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

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


def quantized(model: Path, directory: Path) -> Path:
    """Quantize the model in a separate process (it imports torch); return the directory."""
    command = [sys.executable, "-m", "tests.quantized", str(model), str(directory)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    return directory


def _main(model: Path, directory: Path) -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file, save_file

    directory.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, directory)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if name.startswith("model.layers.") and tensor.ndim > 1:
            packed, state = quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
            tensors[name] = packed
            tensors |= {f"{name}.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    document = json.dumps(config | {"quantization_config": QUANTIZATION}, indent=2)
    (directory / "config.json").write_text(document, encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
