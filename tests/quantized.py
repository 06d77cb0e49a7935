"""Quantizes the tiny model to 4 bits, as the default model is: `python -m tests.quantized MODEL DIRECTORY`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from bench.four_bits import QUANTIZATION, packed


def quantized(model: Path, directory: Path) -> Path:
    """Quantize the model in a separate process (it imports torch); return the directory."""
    command = [sys.executable, "-m", "tests.quantized", str(model), str(directory)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    return directory


def _main(model: Path, directory: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    directory.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, directory)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if name.startswith("model.layers.") and tensor.ndim > 1:
            tensors |= packed(name, tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    document = json.dumps(config | {"quantization_config": QUANTIZATION}, indent=2)
    (directory / "config.json").write_text(document, encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
