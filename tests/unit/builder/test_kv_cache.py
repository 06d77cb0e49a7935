"""The memory of models: parameters as published, KV cache as vLLM accounts for it, and whether they fit a GPU."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builder.doctor import kv_cache, memory, settings, weights
from builder.doctor.gpus import GIB, Gpu, find_gpu
from builder.doctor.kv_cache import KVCache, Layers
from builder.doctor.settings import Settings
from builder.errors import ConfigError, SettingError, UnknownSizeError
from tests.configs import (
    DEEPSEEK_V2_LITE,
    GEMMA_3_4B,
    GPT_OSS_20B,
    LLAMA_3_1_8B,
    PHI_4_4BIT,
    PUBLISHED,
    QWEN3_30B_A3B,
    Published,
)

RTX_4090 = find_gpu("RTX 4090")

each_model = pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a config.json; returns its directory."""

    def write(config: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.fixture
def read(written: Callable[[dict[str, Any]], Path]) -> Callable[[dict[str, Any]], Any]:
    """Loads a config.json as transformers' config."""
    return lambda config: weights.read_config(written(config))[0]


@pytest.fixture
def weigh(written: Callable[[dict[str, Any]], Path]) -> Callable[..., weights.Weights]:
    """Returns the weights of the model of a config.json."""

    def weigh(config: dict[str, Any], **options: Any) -> weights.Weights:
        directory = written(config)
        read, known = weights.read_config(directory)
        return weights.weights(directory, read, known=known, **options)

    return weigh


@pytest.fixture(scope="module")
def vllm() -> SimpleNamespace:
    """VLLM's own accounting, imported once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.config import CacheConfig
        from vllm.config.model import _get_and_verify_max_len
        from vllm.transformers_utils import model_arch_config_convertor as convertors
        from vllm.v1 import kv_cache_interface as specs
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.kv_cache_layout import KVCacheLayout
    return SimpleNamespace(
        CacheConfig=CacheConfig,
        max_len=_get_and_verify_max_len,
        convertors=convertors,
        specs=specs,
        utils=kv_cache_utils,
        layout=KVCacheLayout.LBNHC,
    )


def vllms_request_bytes(vllm: SimpleNamespace, config: Any, length: int, in_flight: int, tensor_parallel: int) -> int:
    """Return the KV cache of a request on one GPU, by vLLM's own specs and groups."""
    import torch

    text = config.get_text_config()
    arch = vllms_arch(vllm, config)
    heads = 1 if arch.is_deepseek_mla else max(1, arch.total_num_kv_heads // tensor_parallel)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * arch.total_num_hidden_layers
    layers: dict[str, Any] = {}
    for index, kind in enumerate(kinds):
        size = text.per_layer_config[index].head_dim if text.is_heterogeneous else arch.head_size
        common = {"block_size": 16, "num_kv_heads": heads, "head_size": size, "dtype": torch.bfloat16}
        if kind == "sliding_attention":
            layers[str(index)] = vllm.specs.SlidingWindowSpec(**common, sliding_window=text.sliding_window)
        elif arch.is_deepseek_mla:
            layers[str(index)] = vllm.specs.MLAAttentionSpec(**common)
        else:
            layers[str(index)] = vllm.specs.FullAttentionSpec(**common)
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=length),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: vllm.layout),
        speculative_config=None,
        max_in_flight_tokens=in_flight,
    )
    groups = vllm.utils.get_kv_cache_groups(vllm_config, layers)
    return int(vllm.utils._max_memory_usage_bytes_from_groups(vllm_config, groups))


def vllms_arch(vllm: SimpleNamespace, config: Any) -> Any:
    convertor = vllm.convertors.MODEL_ARCH_CONFIG_CONVERTORS.get(
        config.model_type, vllm.convertors.ModelArchConfigConvertorBase
    )
    return convertor(config, config.get_text_config()).convert()


@each_model
def test_parameters_are_as_published(model: Published, weigh: Callable[..., weights.Weights]) -> None:
    assert weigh(model.config).parameters == model.parameters


@each_model
def test_kv_cache_of_a_token_is_as_published(model: Published, read: Callable[..., Any]) -> None:
    assert kv_cache.kv_cache_of(read(model.config), Settings()).bytes_per_token == model.token_bytes


@each_model
@pytest.mark.parametrize("tensor_parallel", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 1000, 16384, 131072])
def test_a_requests_kv_cache_is_what_vllm_accounts_for(
    model: Published, length: int, tensor_parallel: int, vllm: SimpleNamespace, read: Callable[..., Any]
) -> None:
    config = read(model.config)

    cache = kv_cache.kv_cache_of(config, Settings(tensor_parallel_size=tensor_parallel))

    expected = vllms_request_bytes(vllm, config, length, 4096, tensor_parallel)
    assert cache.request_bytes(length, 4096) == expected


@pytest.mark.parametrize("wide", [512, 384], ids=["twice as wide", "one and a half times as wide"])
@pytest.mark.parametrize("length", [1000, 131072])
def test_the_kv_cache_of_layers_of_two_widths_is_what_vllm_accounts_for(
    length: int, wide: int, vllm: SimpleNamespace
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("gemma4", text_config={"global_head_dim": wide})
    text = config.get_text_config()
    assert {layer.head_dim for layer in text.per_layer_config} == {256, wide}

    cache = kv_cache.kv_cache_of(config, Settings())

    assert cache.request_bytes(length, 4096) == vllms_request_bytes(vllm, text, length, 4096, 1)


@each_model
def test_the_models_length_is_what_vllm_derives(
    model: Published, vllm: SimpleNamespace, read: Callable[..., Any]
) -> None:
    config = read(model.config)

    derived = vllm.max_len(config, vllms_arch(vllm, config), None, None, False, None)  # noqa: FBT003

    assert kv_cache.model_max_len(config) == model.model_length == derived


def test_linear_rope_scaling_extends_the_length_as_in_vllm(vllm: SimpleNamespace, read: Callable[..., Any]) -> None:
    config = read({**LLAMA_3_1_8B.config, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})

    derived = vllm.max_len(config, vllms_arch(vllm, config), None, None, False, None)  # noqa: FBT003

    assert kv_cache.model_max_len(config) == derived == 262144


def test_defaults_are_those_of_vllm(vllm: SimpleNamespace) -> None:
    assert vllm.CacheConfig.gpu_memory_utilization == settings.GPU_MEMORY_UTILIZATION
    assert vllm.CacheConfig.DEFAULT_BLOCK_SIZE == kv_cache.BLOCK_TOKENS


@pytest.mark.parametrize(
    ("gpu", "seqs", "tokens"),
    [(None, 256, 2048), ("24", 256, 2048), ("A100-80", 256, 2048), ("H100", 1024, 8192), ("B200", 1024, 16384)],
)
def test_batch_limits_depend_on_the_gpu_as_in_vllm(gpu: str | None, seqs: int, tokens: int) -> None:
    assert Settings().batch_limits(find_gpu(gpu) if gpu else None, 131072) == (seqs, tokens)


def test_batch_limits_that_are_set_are_used() -> None:
    assert Settings(max_num_seqs=7, max_num_batched_tokens=512).batch_limits(None, 131072) == (7, 512)


def test_chunked_attention_needs_a_chunk_and_the_tokens_in_flight(vllm: SimpleNamespace) -> None:
    import torch

    spec = vllm.specs.ChunkedLocalAttentionSpec(
        block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, attention_chunk_size=8192
    )

    blocks = Layers("chunked", 1, 4096, 8192).max_blocks(131072, 4096)

    assert blocks == spec.max_admission_blocks_per_request(4096, 131072)


def test_an_fp8_cache_needs_half_the_memory(read: Callable[..., Any]) -> None:
    config = read(LLAMA_3_1_8B.config)

    fp8 = kv_cache.kv_cache_of(config, Settings(kv_cache_dtype="fp8"))

    assert fp8.bytes_per_token * 2 == kv_cache.kv_cache_of(config, Settings()).bytes_per_token


def test_a_checkpoint_may_set_an_fp8_cache(read: Callable[..., Any]) -> None:
    scheme = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}

    cache = kv_cache.kv_cache_of(read({**LLAMA_3_1_8B.config, "quantization_config": scheme}), Settings())

    assert cache.bytes_per_token == LLAMA_3_1_8B.token_bytes // 2


def test_layers_whose_state_is_not_counted_are_noted(read: Callable[..., Any]) -> None:
    config = read(LLAMA_3_1_8B.config)
    config.layer_types = ["linear_attention"] * 24 + ["full_attention"] * 8

    cache = kv_cache.kv_cache_of(config, Settings())

    assert cache.layers == (Layers("full", 8, 4096),)
    assert cache.notes == ("The state of 24 linear_attention layers is not counted.",)


def test_layers_that_share_the_cache_of_others_need_none(read: Callable[..., Any]) -> None:
    config = read(LLAMA_3_1_8B.config)
    config.num_kv_shared_layers = 12

    assert kv_cache.kv_cache_of(config, Settings()).layers[0].count == 20


def test_a_model_without_attention_is_refused(read: Callable[..., Any]) -> None:
    config = read(LLAMA_3_1_8B.config)
    config.num_attention_heads = 0

    with pytest.raises(ConfigError, match="no attention heads"):
        kv_cache.kv_cache_of(config, Settings())


# Weights


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


@pytest.mark.parametrize(("stored", "asked", "size"), [("float32", "auto", 2), ("bfloat16", "float32", 4)])
def test_weights_have_the_width_with_which_vllm_loads_them(
    stored: str, asked: str, size: int, weigh: Callable[..., weights.Weights]
) -> None:
    found = weigh({**LLAMA_3_1_8B.config, "torch_dtype": stored}, dtype=asked)

    assert found.size_bytes == LLAMA_3_1_8B.parameters * size


def test_weights_that_are_quantized_on_loading_are_counted_as_quantized(weigh: Callable[..., weights.Weights]) -> None:
    found = weigh(LLAMA_3_1_8B.config, quantization="bitsandbytes")

    assert found.size_bytes == _LINEAR * 0.5625 + (LLAMA_3_1_8B.parameters - _LINEAR) * 2


def test_an_unknown_quantization_is_noted(weigh: Callable[..., weights.Weights]) -> None:
    found = weigh(LLAMA_3_1_8B.config, quantization="humming")

    assert found.size_bytes == LLAMA_3_1_8B.parameters * 2
    assert "humming" in found.notes[0]


_STRANGE = {**LLAMA_3_1_8B.config, "architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}


def test_the_size_of_an_unknown_architecture_is_that_of_its_files(
    written: Callable[..., Path], weigh: Callable[..., weights.Weights]
) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (written(_STRANGE) / name).write_bytes(b"x" * 1000)

    found = weigh(_STRANGE)

    assert (found.parameters, found.size_bytes) == (None, 2000)
    assert "NoSuchForCausalLM" in found.notes[0]


@pytest.mark.parametrize(
    "config", [_STRANGE, {**LLAMA_3_1_8B.config, "quantization_config": {"quant_method": "no_such"}}]
)
def test_without_files_an_unknown_size_is_an_error(
    config: dict[str, Any], weigh: Callable[..., weights.Weights]
) -> None:
    with pytest.raises(UnknownSizeError, match="no safetensors files"):
        weigh(config)


def test_the_models_own_code_is_not_run(written: Callable[..., Path], weigh: Callable[..., weights.Weights]) -> None:
    directory = written({**_STRANGE, "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}})
    (directory / "code.py").write_text(f"open({str(directory / 'ran')!r}, 'w')")

    with pytest.raises(UnknownSizeError):
        weigh(json.loads((directory / "config.json").read_text()))

    assert not (directory / "ran").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 3}'])
def test_an_invalid_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(ConfigError, match=r"config\.json"):
        weights.read_config(tmp_path)


# Whether it fits


def fit_of(
    model: Published, read: Callable[..., Any], weigh: Callable[..., weights.Weights], **values: Any
) -> memory.Fit:
    gpu = values.pop("gpu", RTX_4090)
    options = Settings(**values)
    config = read(model.config)
    cache = kv_cache.kv_cache_of(config, options)
    return memory.fit(config, weigh(model.config).size_bytes, cache, options, gpu)


def test_phi_4_in_4_bits_fits_24_gb_with_three_requests_of_the_maximum_length(
    read: Callable[..., Any], weigh: Callable[..., weights.Weights]
) -> None:
    fit = fit_of(PHI_4_4BIT, read, weigh)

    assert fit.fits
    assert fit.max_model_len_that_fits == fit.max_model_len == 16384
    assert fit.kv_cache_bytes_per_request == 3.125 * GIB
    assert fit.weights_bytes / GIB == pytest.approx(9.06, abs=0.01)
    assert 3 < (fit.max_concurrency or 0) < 4


@pytest.mark.parametrize(
    ("model", "weights_gib", "request_gib", "thousands"),
    [
        # 8.03e9 parameters of 2 bytes; 131072 tokens, 32 layers, 8 heads of 128, keys and values, 2 bytes: 16 GiB.
        pytest.param(LLAMA_3_1_8B, 14.96, 16.0, (29, 131, 131), id="Llama 3.1 8B"),
        # 30.5e9 parameters of 2 bytes; 40960 tokens, 48 layers, 4 heads of 128.
        pytest.param(QWEN3_30B_A3B, 56.87, 3.75, (0, 0, 40), id="Qwen3 30B A3B"),
        # 4.25 bits for experts, 2 bytes for the rest; 131072 tokens in 12 of 24 layers, 8 heads of 64, and 12 windows.
        pytest.param(GPT_OSS_20B, 12.8, 3.1, (131, 131, 131), id="gpt-oss 20B"),
        # 4.3e9 parameters of 2 bytes; 131072 tokens in 5 of 34 layers, 4 heads of 256 (padded to 6), and 29 windows.
        pytest.param(GEMMA_3_4B, 8.01, 3.1, (131, 131, 131), id="Gemma 3 4B"),
        # 15.7e9 parameters of 2 bytes; 163840 tokens, 27 layers, 512 and 64 latent values.
        pytest.param(DEEPSEEK_V2_LITE, 29.26, 4.75, (0, 163, 163), id="DeepSeek V2 Lite"),
    ],
)
def test_public_models_fit_the_expected_gpus(  # noqa: PLR0913, PLR0917
    model: Published,
    weights_gib: float,
    request_gib: float,
    thousands: tuple[int, int, int],
    read: Callable[..., Any],
    weigh: Callable[..., weights.Weights],
) -> None:
    """The longest request, in thousands of tokens, on an L4 (24 GB), an L40S (48 GB) and an A100 of 80 GB."""
    for name, longest in zip(("L4", "L40S", "A100-80"), thousands, strict=True):
        fit = fit_of(model, read, weigh, gpu=find_gpu(name))

        assert fit.weights_bytes / GIB == pytest.approx(weights_gib, rel=0.005)
        assert fit.kv_cache_bytes_per_request / GIB == pytest.approx(request_gib, rel=0.005)
        assert (fit.max_model_len_that_fits or 0) // 1000 == longest, name
        assert fit.fits is (fit.max_model_len_that_fits == model.model_length), name


def test_the_longest_length_that_fits_is_exact(read: Callable[..., Any], weigh: Callable[..., weights.Weights]) -> None:
    fit = fit_of(LLAMA_3_1_8B, read, weigh)
    assert fit.fits is False
    longest = fit.max_model_len_that_fits
    assert longest is not None

    assert fit_of(LLAMA_3_1_8B, read, weigh, max_model_len=longest).fits
    assert not fit_of(LLAMA_3_1_8B, read, weigh, max_model_len=longest + 1).fits


def test_weights_that_do_not_fit_allow_no_length(
    read: Callable[..., Any], weigh: Callable[..., weights.Weights]
) -> None:
    fit = fit_of(DEEPSEEK_V2_LITE, read, weigh, max_model_len=1)

    assert (fit.fits, fit.max_model_len_that_fits, fit.max_concurrency) == (False, 0, 0)


def test_the_length_auto_is_the_longest_that_fits(
    read: Callable[..., Any], weigh: Callable[..., weights.Weights]
) -> None:
    fit = fit_of(LLAMA_3_1_8B, read, weigh, max_model_len=settings.AUTO_LENGTH)

    assert fit.fits
    assert fit.max_model_len == fit.max_model_len_that_fits
    assert fit.max_model_len_that_fits == fit_of(LLAMA_3_1_8B, read, weigh).max_model_len_that_fits


def test_the_smallest_gpu_fits_and_a_smaller_one_does_not(
    read: Callable[..., Any], weigh: Callable[..., weights.Weights]
) -> None:
    needed = fit_of(LLAMA_3_1_8B, read, weigh).min_gpu_memory_bytes

    assert fit_of(LLAMA_3_1_8B, read, weigh, gpu=Gpu("", needed + 2)).fits
    assert not fit_of(LLAMA_3_1_8B, read, weigh, gpu=Gpu("", needed - GIB // 64)).fits


def test_two_gpus_share_weights_and_heads(read: Callable[..., Any], weigh: Callable[..., weights.Weights]) -> None:
    one, two = (fit_of(LLAMA_3_1_8B, read, weigh, tensor_parallel_size=size) for size in (1, 2))

    assert two.weights_bytes == one.weights_bytes // 2
    assert two.kv_cache_bytes_per_request == one.kv_cache_bytes_per_request // 2


def test_without_a_gpu_only_the_needed_memory_is_known(
    read: Callable[..., Any], weigh: Callable[..., weights.Weights]
) -> None:
    fit = fit_of(GEMMA_3_4B, read, weigh, gpu=None)

    assert (fit.fits, fit.max_model_len_that_fits, fit.budget_bytes) == (None, None, None)
    assert fit.min_gpu_memory_bytes > fit.weights_bytes + fit.kv_cache_bytes_per_request


def test_overhead_follows_its_rule_of_thumb(read: Callable[..., Any]) -> None:
    assert memory.overhead(read(LLAMA_3_1_8B.config), Settings(), 256, 2048) == {
        "workspaces": GIB // 2,
        "activations": 2048 * (6 * 4096 + 3 * 14336) * 2,
        "sampling": 256 * 128256 * 16,
        "CUDA graphs": 51 * 33 * GIB // 4096,
    }


def test_eager_mode_needs_no_cuda_graphs(read: Callable[..., Any]) -> None:
    config = read(LLAMA_3_1_8B.config)

    assert memory.overhead(config, Settings(enforce_eager=True), 256, 2048)["CUDA graphs"] == 0


@pytest.mark.parametrize("text", ["RTX 4090", "rtx4090", "4090", "NVIDIA GeForce RTX 4090"])
def test_a_gpu_is_found_by_any_spelling_of_its_name(text: str) -> None:
    assert find_gpu(text) == Gpu("RTX 4090", int(23.5 * GIB))


@pytest.mark.parametrize("text", ["24", "24GB", "24 GiB", "24.0"])
def test_a_gpu_may_be_given_by_its_memory(text: str) -> None:
    assert find_gpu(text).memory_bytes == 24 * GIB


@pytest.mark.parametrize("text", ["abacus", "0", "-3", "inf", ""])
def test_the_error_for_an_unknown_gpu_lists_the_known_ones(text: str) -> None:
    with pytest.raises(SettingError, match="RTX 4090"):
        find_gpu(text)


def test_layers_of_two_kinds_have_blocks_of_one_size() -> None:
    # 5 + 29 layers are 1 + 6 groups of 5, the last padded; each has its own block table.
    cache = KVCache((Layers("full", 5, 16), Layers("sliding", 29, 16, 1024)))

    assert cache.request_bytes(16000, 0) == 5 * 16 * 16 * (1000 + 6 * 65)


def test_kinds_with_similar_layer_counts_are_padded_to_the_larger() -> None:
    cache = KVCache((Layers("full", 13, 16), Layers("sliding", 12, 16, 1024)))

    assert cache.request_bytes(16000, 0) == 13 * 16 * 16 * (1000 + 65)
