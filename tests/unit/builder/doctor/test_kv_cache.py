"""The KV cache is as published, and as vLLM accounts for it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from builder.doctor import kv_cache
from builder.doctor.kv_cache import KVCache, LayerKind
from builder.doctor.settings import Settings
from builder.errors import ConfigError
from tests.configs import LLAMA_3_1_8B, PHI_4_4BIT, PUBLISHED, Published

each_model = pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)


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
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: vllm.layout,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        speculative_config=None,
        max_in_flight_tokens=in_flight,
    )
    groups = vllm.utils.get_kv_cache_groups(vllm_config, layers)
    # Since 0.33 a platform may place the cache in its own way.
    builder = getattr(vllm.utils, "DefaultKVCacheConfigBuilder", None)
    placed = () if builder is None else (builder(),)
    return int(vllm.utils._max_memory_usage_bytes_from_groups(*placed, vllm_config, groups))


def vllms_arch(vllm: SimpleNamespace, config: Any) -> Any:
    convertor = vllm.convertors.MODEL_ARCH_CONFIG_CONVERTORS.get(
        config.model_type, vllm.convertors.ModelArchConfigConvertorBase
    )
    return convertor(config, config.get_text_config()).convert()


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

    assert kv_cache.context_limit(config) == model.model_length == derived


def test_linear_rope_scaling_extends_the_length_as_in_vllm(vllm: SimpleNamespace, read: Callable[..., Any]) -> None:
    config = read({**LLAMA_3_1_8B.config, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})

    derived = vllm.max_len(config, vllms_arch(vllm, config), None, None, False, None)  # noqa: FBT003

    assert kv_cache.context_limit(config) == derived == 262144


LONGROPE = {
    **PHI_4_4BIT.config,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 64, "short_factor": [1.0] * 64},
}
LARGER = {**LLAMA_3_1_8B.config, "max_position_embeddings": 8192, "model_max_length": 131072, "rope_scaling": None}


@pytest.mark.parametrize(("values", "default", "limit"), [(LONGROPE, 4096, 131072), (LARGER, 131072, 131072)])
def test_the_default_length_and_the_limit_are_what_vllm_derives(
    values: dict[str, Any], default: int, limit: int, vllm: SimpleNamespace, read: Callable[..., Any]
) -> None:
    config = read(values)

    def derived(length: int | None) -> int:
        return int(vllm.max_len(config, vllms_arch(vllm, config), None, length, False, None))  # noqa: FBT003

    assert kv_cache.default_max_model_len(config) == derived(None) == default
    assert kv_cache.context_limit(config) == derived(limit) == limit
    with pytest.raises(ValueError, match="greater than the derived"):
        derived(limit + 1)


@pytest.mark.parametrize(("used", "kind"), [({}, "sliding"), ({"use_sliding_window": False}, "full")])
def test_an_unknown_model_has_a_sliding_window_only_if_it_is_used(
    used: dict[str, bool], kind: str, read: Callable[..., Any]
) -> None:
    config = read({**LLAMA_3_1_8B.config, "model_type": "no_such", "sliding_window": 4096, **used})

    assert [layers.kind for layers in kv_cache.kv_cache_of(config, Settings()).layers] == [kind]


def test_chunked_attention_needs_a_chunk_and_the_tokens_in_flight(vllm: SimpleNamespace) -> None:
    import torch

    spec = vllm.specs.ChunkedLocalAttentionSpec(
        block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, attention_chunk_size=8192
    )

    blocks = LayerKind("chunked", 1, 4096, 8192).max_blocks(131072, 4096)

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

    assert cache.layers == (LayerKind("full", 8, 4096),)
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


def test_layers_of_two_kinds_have_blocks_of_one_size() -> None:
    # 5 + 29 layers are 1 + 6 groups of 5, the last padded; each has its own block table.
    cache = KVCache((LayerKind("full", 5, 16), LayerKind("sliding", 29, 16, 1024)))

    assert cache.request_bytes(16000, 0) == 5 * 16 * 16 * (1000 + 6 * 65)


def test_kinds_with_similar_layer_counts_are_padded_to_the_larger() -> None:
    cache = KVCache((LayerKind("full", 13, 16), LayerKind("sliding", 12, 16, 1024)))

    assert cache.request_bytes(16000, 0) == 13 * 16 * 16 * (1000 + 65)
