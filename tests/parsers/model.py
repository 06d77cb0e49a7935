"""The tiny model with the special tokens of other models: `python -m tests.parsers.model MODEL DIRECTORY`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.parsers.samples import PLAIN, PLAIN_SEED, RESPONSE_TEMPLATE, SPECIAL_TOKENS, TOKENS, VOCABULARY
from tests.processes import ROOT

# The same as in `tests.parsers.forced`, which only the engine's process can import.
ANSWERS = "answers.json"


def with_special_tokens(model: Path, directory: Path) -> Path:
    """Make the model in a separate process, as it imports torch and takes seconds; return the directory."""
    command = [sys.executable, "-m", "tests.parsers.model", str(model), str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return directory


def _main(model: Path, directory: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import AddedToken, Tokenizer

    shutil.copytree(model, directory, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.zeros((VOCABULARY, tensors[name].shape[1]), dtype=tensors[name].dtype)
        rows[: len(tensors[name])] = tensors[name]
        tensors[name] = rows
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    plain = tokenizer.encode(PLAIN, add_special_tokens=False).ids
    ids = [*plain, tokenizer.token_to_id("<|im_end|>")]
    answers = {PLAIN_SEED: ids, PLAIN_SEED + 1: ids}  # vLLM uses the next seed for a second choice.
    (directory / ANSWERS).write_text(json.dumps(answers), encoding="utf-8")
    _change(directory / "config.json", vocab_size=VOCABULARY)
    _change(directory / "tokenizer_config.json", response_template=RESPONSE_TEMPLATE)


def _change(path: Path, **values: object) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | values), encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
