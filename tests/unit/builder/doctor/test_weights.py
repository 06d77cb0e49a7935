"""The size of weights: parameters as published, widths as vLLM loads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.doctor import weights
from builder.errors import ConfigError, UnknownSizeError
from tests.configs import GPT_OSS_20B, LLAMA_3_1_8B, PHI_4_4BIT, PUBLISHED, Published


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)
def test_parameters_are_as_published(model: Published, weigh: Callable[..., weights.Weights]) -> None:
    assert weigh(model.config).parameters == model.parameters


def test_embeddings_and_norms_of_a_4_bit_model_are_not_quantized(weigh: Callable[..., weights.Weights]) -> None:
    embeddings, norms = 2 * 100352 * 5120, 81 * 5120
    linear = PHI_4_4BIT.parameters - embeddings - norms

    # 4 bits, and a float32 scale per 64 values; vLLM's plugin reverts double quantization.
    assert weigh(PHI_4_4BIT.config).size_bytes == linear * 0.5625 + (embeddings + norms) * 2


def test_skipped_modules_are_not_quantized(weigh: Callable[..., weights.Weights]) -> None:
    skipped = {**PHI_4_4BIT.config["quantization_config"], "llm_int8_skip_modules": ["model.layers.3.mlp"]}
    mlp = 3 * 5120 * 17920

    wider = weigh({**PHI_4_4BIT.config, "quantization_config": skipped}).size_bytes

    assert wider - weigh(PHI_4_4BIT.config).size_bytes == mlp * (2 - 0.5625)


def test_gpt_oss_with_mxfp4_experts_is_as_large_as_its_files(weigh: Callable[..., weights.Weights]) -> None:
    published_files = 13_761_264_768

    assert weigh(GPT_OSS_20B.config).size_bytes == pytest.approx(published_files, rel=0.001)


def test_mxfp4_quantizes_only_experts_even_if_the_config_does_not_say_so(weigh: Callable[..., weights.Weights]) -> None:
    silent = {**GPT_OSS_20B.config, "quantization_config": {"quant_method": "mxfp4"}}

    assert weigh(silent).size_bytes == weigh(GPT_OSS_20B.config).size_bytes


_LINEAR = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
_GROUP = {"num_bits": 4, "group_size": 128, "type": "int"}


@pytest.mark.parametrize(
    ("quantization", "width"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1 + 4 / 128**2),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, 1),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 1),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": _GROUP}}},
            0.5 + 2 / 128,
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 0.5 + 1 / 16),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else None,
)
def test_quantized_weights_are_counted_with_their_scales(
    quantization: dict[str, Any], width: float, weigh: Callable[..., weights.Weights]
) -> None:
    found = weigh({**LLAMA_3_1_8B.config, "quantization_config": {**quantization, "ignore": ["re:.*lm_head"]}})

    wide = LLAMA_3_1_8B.parameters - _LINEAR
    assert found.quantization == quantization["quant_method"]
    assert found.size_bytes == pytest.approx(_LINEAR * width + wide * 2, abs=1)


def test_tied_embeddings_are_counted_once(weigh: Callable[..., weights.Weights]) -> None:
    tied = weigh({**LLAMA_3_1_8B.config, "tie_word_embeddings": True})

    assert tied.parameters == LLAMA_3_1_8B.parameters - 128256 * 4096


@pytest.mark.parametrize(("stored", "dtype", "size"), [("float32", "auto", 2), ("bfloat16", "float32", 4)])
def test_weights_have_the_width_with_which_vllm_loads_them(
    stored: str, dtype: str, size: int, weigh: Callable[..., weights.Weights]
) -> None:
    found = weigh({**LLAMA_3_1_8B.config, "torch_dtype": stored}, dtype=dtype)

    assert found.size_bytes == LLAMA_3_1_8B.parameters * size


def test_weights_that_are_quantized_on_loading_are_counted_as_quantized(weigh: Callable[..., weights.Weights]) -> None:
    found = weigh(LLAMA_3_1_8B.config, quantization="bitsandbytes")

    assert found.size_bytes == _LINEAR * 0.5625 + (LLAMA_3_1_8B.parameters - _LINEAR) * 2


@pytest.mark.parametrize("quantization", [None, "bitsandbytes", "fp8"])
def test_files_are_stored_as_wide_as_the_checkpoint_is(
    quantization: str | None, weigh: Callable[..., weights.Weights]
) -> None:
    found = weigh({**LLAMA_3_1_8B.config, "torch_dtype": "float32"}, quantization=quantization)

    assert found.stored_bytes == LLAMA_3_1_8B.parameters * 4


def test_files_of_a_quantized_checkpoint_are_stored_quantized(weigh: Callable[..., weights.Weights]) -> None:
    found = weigh(PHI_4_4BIT.config)

    assert found.stored_bytes == found.size_bytes


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "awq", "group_size": 128, "bits": None},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}},
    ],
)
def test_an_incomplete_quantization_is_of_unknown_size(
    quantization: dict[str, Any], weigh: Callable[..., weights.Weights]
) -> None:
    with pytest.raises(UnknownSizeError, match="weights is unknown"):
        weigh({**LLAMA_3_1_8B.config, "quantization_config": quantization})


def test_an_unknown_quantization_is_noted(weigh: Callable[..., weights.Weights]) -> None:
    found = weigh(LLAMA_3_1_8B.config, quantization="humming")

    assert found.size_bytes == LLAMA_3_1_8B.parameters * 2
    assert "humming" in found.notes[0]


_UNKNOWN = {**LLAMA_3_1_8B.config, "architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}


def test_the_size_of_an_unknown_architecture_is_that_of_its_files(
    written: Callable[..., Path], weigh: Callable[..., weights.Weights]
) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (written(_UNKNOWN) / name).write_bytes(b"x" * 1000)

    found = weigh(_UNKNOWN)

    assert (found.parameters, found.size_bytes) == (None, 2000)
    assert "NoSuchForCausalLM" in found.notes[0]


@pytest.mark.parametrize(
    "config", [_UNKNOWN, {**LLAMA_3_1_8B.config, "quantization_config": {"quant_method": "no_such"}}]
)
def test_without_files_an_unknown_size_is_an_error(
    config: dict[str, Any], weigh: Callable[..., weights.Weights]
) -> None:
    with pytest.raises(UnknownSizeError, match="no safetensors files"):
        weigh(config)


def test_the_models_own_code_is_not_run(written: Callable[..., Path], weigh: Callable[..., weights.Weights]) -> None:
    directory = written({**_UNKNOWN, "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}})
    (directory / "code.py").write_text(f"open({str(directory / 'ran')!r}, 'w')")

    with pytest.raises(UnknownSizeError):
        weigh(json.loads((directory / "config.json").read_text()))

    assert not (directory / "ran").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 3}'])
def test_an_invalid_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(ConfigError, match=r"config\.json"):
        weights.read_config(tmp_path)
