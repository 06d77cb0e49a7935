"""The size of a model's KV cache: arithmetic on its config, with the accounting of vLLM 0.32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from builder.doctor.settings import KV_CACHE_DTYPES, Settings
from builder.errors import ConfigError

# vLLM's `CacheConfig.DEFAULT_BLOCK_SIZE`.
BLOCK_TOKENS = 16

# Those of vLLM's `derive_max_model_len_and_key`.
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_SCALED_ALREADY = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
_STATEFUL = ("mamba_d_state", "ssm_state_size", "state_size", "mamba_d_conv", "linear_conv_kernel_dim")


@dataclass(frozen=True)
class LayerKind:
    """Layers with the same kind of attention.

    Attributes:
        kind: `full`, `sliding` or `chunked`.
        count: number of layers.
        bytes_per_token: KV cache of a token in one layer, on one GPU.
        window: tokens of the sliding window or chunk; 0 for full attention.
    """

    kind: str
    count: int
    bytes_per_token: int
    window: int = 0

    def max_blocks(self, length: int, in_flight_tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
        """Return the most blocks that a request of this length needs; windows free the blocks that they leave."""
        match self.kind:
            case "sliding":  # the window may begin and end within a block
                return -(-min(self.window - 1 + in_flight_tokens, length) // block_tokens) + 1
            case "chunked":
                return -(-min(self.window + in_flight_tokens, length) // block_tokens)
        return -(-length // block_tokens)


@dataclass(frozen=True)
class KVCache:
    """The KV cache of a model: its layers by kind, and notes on what is not counted."""

    layers: tuple[LayerKind, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """KV cache of one more token of a short request, on one GPU."""
        return sum(layers.count * layers.bytes_per_token for layers in self.layers)

    def request_bytes(self, length: int, in_flight_tokens: int) -> int:
        """Return the most KV cache that a request of this length needs, on one GPU.

        vLLM puts layers of each kind into groups of one size, so the last group of a kind may be padded, and gives
        blocks of one size to all groups: smaller layers have more tokens in a block, or a block that is not full
        (`unify_kv_cache_spec_page_size`, `_get_kv_cache_groups_uniform_page_size`).
        """
        if len({(layers.kind, layers.window) for layers in self.layers}) == 1:  # one group, whatever the sizes
            return self.bytes_per_token * BLOCK_TOKENS * self.layers[0].max_blocks(length, in_flight_tokens)
        counts = [layers.count for layers in self.layers]
        group_size = max(counts) if max(counts) < min(counts) * 1.5 else min(counts)
        page_bytes = max(layers.bytes_per_token for layers in self.layers) * BLOCK_TOKENS
        blocks = 0
        for layers in self.layers:
            divides = page_bytes % (layers.bytes_per_token * BLOCK_TOKENS) == 0
            block_tokens = page_bytes // layers.bytes_per_token if divides else BLOCK_TOKENS
            groups = -(-layers.count // group_size)
            blocks += groups * layers.max_blocks(length, in_flight_tokens, block_tokens)
        return page_bytes * group_size * blocks


def context_limit(config: Any) -> int:
    """Return the longest context that vLLM allows, in tokens: the limit of MAX_MODEL_LEN."""
    text = config.get_text_config()
    lengths = (int(value) for key in _LENGTH_KEYS if (value := getattr(text, key, None)))
    length = int(getattr(text, "model_max_length", None) or min(lengths, default=2048))
    if "gemma3" in (config.model_type or ""):
        return length  # already scaled
    factors = [rope.get("factor") or 1 for rope in _ropes(config) if rope.get("rope_type") not in _SCALED_ALREADY]
    return int(length * (factors[-1] if factors else 1))


def default_max_model_len(config: Any) -> int:
    """Return vLLM's MAX_MODEL_LEN if none is set: of LongRoPE the original length, which it does not degrade."""
    limit = context_limit(config)
    if any(rope.get("rope_type") == "longrope" for rope in _ropes(config)):
        return int(getattr(config, "original_max_position_embeddings", None) or limit)
    return limit


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Return the RoPE parameters: one dict for all layers, or one for each type of layer."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]


def kv_cache_of(config: Any, settings: Settings) -> KVCache:
    """Return the KV cache of the model's attention layers.

    Raises:
        ConfigError: the config has no attention layers, or of an unknown kind only.
    """
    text = config.get_text_config()
    if not getattr(text, "num_hidden_layers", None) or not getattr(layer_configs(text)[0], "num_attention_heads", None):
        raise ConfigError("the config has no attention heads and layers from which to compute the KV cache")
    if getattr(text, "compress_ratios", None):
        raise ConfigError(f"the compressed KV cache of {text.model_type} cannot be computed from its config")
    width = KV_CACHE_DTYPES[settings.kv_cache_dtype] or _default_width(config, settings)
    found: Counter[LayerKind] = Counter()
    others: Counter[str] = Counter()
    shared = getattr(text, "num_kv_shared_layers", None) or 0  # the last layers, which use the cache of earlier ones
    for kind, layer in list(zip(_layer_types(text), layer_configs(text), strict=True))[
        : text.num_hidden_layers - shared
    ]:
        match kind.removesuffix("_attention"):
            case "full" | "indexed":
                found[LayerKind("full", 1, _bytes_per_token(layer, settings, width))] += 1
            case "sliding" | "chunked" as name:
                window = getattr(layer, "sliding_window" if name == "sliding" else "attention_chunk_size", None)
                layers = LayerKind(name if window else "full", 1, _bytes_per_token(layer, settings, width), window or 0)
                found[layers] += 1
            case "moe" | "mlp":
                pass
            case _:
                others[kind] += 1
    if not found:
        raise ConfigError("the config has no layers with a known kind of KV cache")
    notes = [f"The state of {count} {kind} layers is not counted." for kind, count in others.items()]
    layers_by_kind = (replace(layers, count=count) for layers, count in found.items())
    return KVCache(tuple(layers_by_kind), (*notes, *_uncounted(config)))


def layer_configs(text: Any) -> list[Any]:
    """Return the config of each layer; they differ in some models, such as Gemma 4."""
    if getattr(text, "is_heterogeneous", False):
        return list(text.per_layer_config)
    return [text] * int(text.num_hidden_layers)


def _layer_types(text: Any) -> list[str]:
    """Return the type of each layer, as transformers names it."""
    types = list(getattr(text, "layer_types", None) or [])
    if len(types) == text.num_hidden_layers:
        return types
    windowed = getattr(layer_configs(text)[0], "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * text.num_hidden_layers


def _uncounted(config: Any) -> Iterator[str]:
    """Yield notes on state outside the attention layers."""
    text = config.get_text_config()
    if not getattr(text, "layer_types", None) and any(getattr(text, name, None) for name in _STATEFUL):
        yield "The model seems to have recurrent layers: all are counted as attention."
    if getattr(text, "index_head_dim", None):
        yield "The index of its sparse attention is not counted."
    if getattr(config, "is_encoder_decoder", False):
        yield "Cross-attention is not counted."


def _default_width(config: Any, settings: Settings) -> int:
    """Return the bytes of a value for KV_CACHE_DTYPE=auto: the checkpoint decides."""
    quantized = getattr(config, "quantization_config", None) or {}
    quantized = quantized if isinstance(quantized, dict) else quantized.to_dict()
    if quantized.get("kv_cache_scheme") or str(quantized.get("kv_cache_quant_algo")).upper() == "FP8":
        return 1
    return 4 if settings.dtype in ("float", "float32") else 2


def _bytes_per_token(layer: Any, settings: Settings, width: int) -> int:
    """Return the KV cache of a token in one layer on one GPU."""
    if getattr(layer, "kv_lora_rank", None):  # MLA: one latent vector, replicated on each GPU
        return int(layer.kv_lora_rank + layer.qk_rope_head_dim) * width
    heads = next(
        value
        for name in ("num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_heads")
        if (value := getattr(layer, name, None))
    )
    head_size = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return int(2 * max(1, heads // settings.tensor_parallel_size) * head_size * width)
