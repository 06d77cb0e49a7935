"""Which files of a repository are required, and when a directory is complete; the listings are shortened real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builder.layout import is_complete, is_weights, required_files

M = "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json"
T = "merges.txt special_tokens_map.json tokenizer.json tokenizer_config.json vocab.json"


@pytest.mark.parametrize(
    ("listing", "wanted"),
    [
        pytest.param(
            f".gitattributes README.md config.json generation_config.json {M} {T}",
            f"config.json generation_config.json {M} {T}",
            id="unsloth/phi-4-bnb-4bit",
        ),
        pytest.param(
            f"LICENSE USE_POLICY.md config.json {M} {T} original/consolidated.00.pth "
            "original/params.json original/tokenizer.model",
            f"LICENSE USE_POLICY.md config.json {M} {T}",
            id="meta-llama/Llama-3.1-8B-Instruct",
        ),
        pytest.param(
            f"chat_template.jinja config.json {M} tokenizer.json metal/model.bin original/config.json "
            "original/model.safetensors",
            f"chat_template.jinja config.json {M} tokenizer.json",
            id="openai/gpt-oss-20b",
        ),
        pytest.param(
            f"config.json consolidated.safetensors {M} params.json tokenizer.model",
            f"config.json {M} params.json tokenizer.model",
            id="mistralai/Mistral-7B-Instruct-v0.3",
        ),
        pytest.param(
            "consolidated.safetensors params.json tekken.json",
            "consolidated.safetensors params.json tekken.json",
            id="only mistral's format",
        ),
        pytest.param(
            "config.json flax_model.msgpack model.safetensors pytorch_model.bin rust_model.ot "
            "tf_model.h5 onnx/model.onnx vocab.txt",
            "config.json model.safetensors vocab.txt",
            id="google-bert/bert-base-uncased",
        ),
        pytest.param(
            "config.json pytorch_model-00001-of-00001.bin pytorch_model.bin.index.json tokenizer.model "
            "training_args.bin optimizer.pt rng_state_0.pth",
            "config.json pytorch_model-00001-of-00001.bin pytorch_model.bin.index.json tokenizer.model",
            id="only PyTorch's format",
        ),
        pytest.param(
            "config.json pytorch_model.bin quantizer.bin vocab.txt",
            "config.json pytorch_model.bin vocab.txt",
            id="PyTorch's format, and a file that transformers does not write",
        ),
        pytest.param(
            "config.json weights.bin training_args.bin tokenizer.json model.pt",
            "config.json tokenizer.json weights.bin",
            id="PyTorch's format under a name that only vLLM accepts",
        ),
        pytest.param(
            "1_Pooling/config.json 2_Dense/config.json 2_Dense/model.safetensors "
            "2_Dense/pytorch_model.bin config.json model.safetensors modules.json "
            "openvino/openvino_model.bin vocab.txt",
            "1_Pooling/config.json 2_Dense/config.json 2_Dense/model.safetensors config.json "
            "model.safetensors modules.json vocab.txt",
            id="a sentence-transformers model",
        ),
        pytest.param(
            "config.json modeling_x.py model.safetensors assets/figure.png "
            "checkpoint-500/model.safetensors runs/events.json examples/demo.mp4",
            "config.json modeling_x.py model.safetensors",
            id="custom code, and training artifacts",
        ),
        pytest.param(
            f"config.json {M} params.json consolidated-00001-of-00002.safetensors "
            "consolidated-00002-of-00002.safetensors consolidated.safetensors.index.json tokenizer.json",
            f"config.json {M} params.json tokenizer.json",
            id="mistralai/Mistral-Large-Instruct-2411, with an index for each format",
        ),
        pytest.param(
            "consolidated-00001-of-00001.safetensors consolidated.safetensors.index.json params.json tekken.json",
            "consolidated-00001-of-00001.safetensors consolidated.safetensors.index.json params.json tekken.json",
            id="only mistral's format, in shards",
        ),
        pytest.param(
            "config.json model-00001-of-000163.safetensors model.safetensors.index.json tokenizer.json",
            "config.json model-00001-of-000163.safetensors model.safetensors.index.json tokenizer.json",
            id="deepseek-ai/DeepSeek-V3, with six digits",
        ),
        pytest.param(
            f"config.json model.safetensors {M} tokenizer.json",
            f"config.json {M} tokenizer.json",
            id="the same weights in one file and in shards",
        ),
        pytest.param(
            "adapter_config.json adapter_model.safetensors config.json pytorch_model.bin tokenizer.json",
            "adapter_config.json config.json pytorch_model.bin tokenizer.json",
            id="an adapter next to its base model",
        ),
        pytest.param(
            "adapter_config.json adapter_model.safetensors tokenizer.json",
            "adapter_config.json tokenizer.json",
            id="only an adapter, which is not a model",
        ),
        pytest.param(
            f"config.json {M} tokenizer.json flax_model-00001-of-00002.msgpack flax_model.msgpack.index.json "
            "model_index.json pytorch_model.bin.index.json tf_model-00001-of-00002.h5 tf_model.h5.index.json",
            f"config.json {M} model_index.json tokenizer.json",
            id="shard indexes of other formats",
        ),
        pytest.param(
            "consolidated.safetensors params.json tokenizer.model.v3 tokenizer.model.v7m1 weights.model.v3.gz",
            "consolidated.safetensors params.json tokenizer.model.v3 tokenizer.model.v7m1",
            id="only mistral's format, with numbered tokenizers",
        ),
        pytest.param(
            "config.json model.safetensors model-manifest.json tokenizer.json",
            "config.json model.safetensors tokenizer.json",
            id="a model that was uploaded with our manifest",
        ),
        pytest.param(
            "README.md model-Q4_K_M.gguf",
            "",
            id="only GGUF",
        ),
    ],
)
def test_only_required_files_are_selected(listing: str, wanted: str) -> None:
    assert required_files(listing.split()) == sorted(wanted.split())


@pytest.mark.parametrize(
    "listing",
    [
        f"config.json {M} tokenizer.json",
        "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors tokenizer.json",
        f"config.json consolidated.safetensors {M} params.json tokenizer.model",
        "config.json pytorch_model-00001-of-00001.bin pytorch_model.bin.index.json tokenizer.model training_args.bin",
        "consolidated.safetensors params.json tekken.json",
        "config.json weights.bin vocab.txt",
        "consolidated.safetensors params.json tokenizer.model.v3",
        "config.json model.pt tokenizer.json optimizer.pt",
    ],
)
def test_the_required_files_are_complete_and_none_without_any_of_its_weights(listing: str, tmp_path: Path) -> None:
    """What a download selects is what the worker accepts in a cache."""
    files = required_files(listing.split())
    weights = [name for name in files if is_weights(name)]
    for name in files:
        (tmp_path / name).write_text(json.dumps({"weight_map": {name: name for name in weights}}))
    assert weights
    assert is_complete(tmp_path)

    for name in weights:
        (tmp_path / name).rename(tmp_path / "hidden")
        assert not is_complete(tmp_path), name
        (tmp_path / "hidden").rename(tmp_path / name)
