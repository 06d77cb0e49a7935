"""Whether a model fits a GPU: arithmetic over its config, as vLLM 0.32 divides the memory.

vLLM takes `memory * gpu_memory_utilization`. What weights and overhead leave of it is the KV cache, and a start fails
unless one request of the greatest length fits there. Weights are counted (`builder.doctor.weights`) and the KV cache is
vLLM's own accounting; the overhead is a rule of thumb (`overhead`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from builder.errors import ConfigError, SettingError

GIB = 2**30

# What vLLM sees as a GPU's whole memory, in GiB: some percent below what is printed on the box.
GPUS_GIB = {
    "L4": 22.0,
    "A10": 22.0,
    "RTX 3090": 23.6,
    "RTX 4090": 23.5,
    "RTX 5090": 31.3,
    "A40": 44.3,
    "L40S": 44.4,
    "A6000": 47.4,
    "A100-40": 39.4,
    "A100-80": 79.1,
    "H100": 79.1,
    "H200": 139.8,
    "B200": 178.3,
}

# vLLM's: `CacheConfig`, and `EngineArgs.get_batch_defaults` for its API server by the GPU's memory.
GPU_MEMORY_UTILIZATION = 0.92
BLOCK_TOKENS = 16
_LARGE_BYTES = 70 * GIB
_LARGEST_BYTES = 160 * GIB
# With asynchronous scheduling one batch is scheduled while another runs.
_BATCHES_IN_FLIGHT = 2
AUTO_LENGTH = -1

# Bytes of a value in the KV cache; 0 for the width of the weights.
KV_CACHE_DTYPES = {"auto": 0, "half": 2, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}

_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
_SCALED_ALREADY = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
_STATEFUL = ("mamba_d_state", "ssm_state_size", "state_size", "mamba_d_conv", "linear_conv_kernel_dim")


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, and the memory that vLLM sees."""

    name: str
    memory_bytes: int

    @property
    def is_large(self) -> bool:
        """Whether vLLM's defaults for it are those of large GPUs; an A100's are not, however large."""
        return self.memory_bytes >= _LARGE_BYTES and "a100" not in self.name.lower()


@dataclass(frozen=True)
class Settings:
    """Settings of vLLM that memory depends on; None leaves one to vLLM. A length of -1 is what fits."""

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    enforce_eager: bool = False

    def with_defaults(self, gpu: Gpu | None, length: int) -> tuple[int, int]:
        """Return the most requests at once and the most tokens a batch, as vLLM sets them on this GPU."""
        large = gpu is not None and gpu.is_large
        largest = large and gpu is not None and gpu.memory_bytes >= _LARGEST_BYTES
        seqs = self.max_num_seqs or (1024 if large else 256)
        tokens = self.max_num_batched_tokens
        if tokens is None:
            tokens = min(16384 if largest else 8192 if large else 2048, seqs * length)
        return (seqs if self.max_num_seqs else min(seqs, tokens)), tokens


@dataclass(frozen=True)
class Layers:
    """Layers whose attention is of one kind.

    Attributes:
        kind: `full`, `sliding` or `chunked`.
        count: how many layers.
        token_bytes: what a token takes in one layer, on one GPU.
        window: tokens that such a layer looks back; 0 for all.
    """

    kind: str
    count: int
    token_bytes: int
    window: int = 0

    def blocks(self, length: int, in_flight: int, block_tokens: int = BLOCK_TOKENS) -> int:
        """Return the blocks that a request of this length holds at most; windows let go of what has been computed."""
        match self.kind:
            case "sliding":  # the window may begin and end within a block
                return -(-min(self.window - 1 + in_flight, length) // block_tokens) + 1
            case "chunked":
                return -(-min(self.window + in_flight, length) // block_tokens)
        return -(-length // block_tokens)


@dataclass(frozen=True)
class Cache:
    """The KV cache of a model: its layers by kind, and what is not counted, a sentence each."""

    layers: tuple[Layers, ...]
    notes: tuple[str, ...] = ()

    @property
    def token_bytes(self) -> int:
        """What one more token of a short request takes, on one GPU."""
        return sum(layers.count * layers.token_bytes for layers in self.layers)

    def request_bytes(self, length: int, in_flight: int) -> int:
        """Return what one request of this length takes at most, on one GPU.

        vLLM puts layers of each kind into groups of one size, so the last group of a kind may be padded, and gives
        blocks of one size to all groups: smaller layers have more tokens in a block, or a block that is not full
        (`unify_kv_cache_spec_page_size`, `_get_kv_cache_groups_uniform_page_size`).
        """
        if len({(layers.kind, layers.window) for layers in self.layers}) == 1:  # one group, whatever the sizes
            return self.token_bytes * BLOCK_TOKENS * self.layers[0].blocks(length, in_flight)
        counts = [layers.count for layers in self.layers]
        size = max(counts) if max(counts) < min(counts) * 1.5 else min(counts)
        page = max(layers.token_bytes for layers in self.layers) * BLOCK_TOKENS
        blocks = 0
        for layers in self.layers:
            fits = page % (layers.token_bytes * BLOCK_TOKENS) == 0
            block_tokens = page // layers.token_bytes if fits else BLOCK_TOKENS
            blocks += -(-layers.count // size) * layers.blocks(length, in_flight, block_tokens)
        return page * size * blocks


@dataclass(frozen=True)
class Fit:
    """What a model needs on each GPU, and what is there; sizes in bytes.

    Attributes:
        length: the greatest length of a request that is asked for.
        model_length: the greatest that the model is made for.
        max_num_seqs: the most requests at once.
        weights: the weights' share.
        overhead: everything else but the KV cache, by what it is for.
        request: KV cache of one request of `length`.
        budget: what vLLM takes of the GPU; None if no GPU is named.
        longest: the longest single request that fits, at most `model_length`; None if no GPU is named.
        smallest_gpu: memory of the smallest GPU that one request of `length` fits.
    """

    length: int
    model_length: int
    max_num_seqs: int
    weights: int
    overhead: dict[str, int] = field(compare=False)
    request: int
    budget: int | None
    longest: int | None
    smallest_gpu: int

    @property
    def room(self) -> int | None:
        """What is left for the KV cache; below 0 if not even the weights fit."""
        return None if self.budget is None else self.budget - self.weights - sum(self.overhead.values())

    @property
    def sequences(self) -> float | None:
        """How many requests of `length` fit at once."""
        return None if self.room is None else max(self.room, 0) / max(self.request, 1)

    @property
    def fits(self) -> bool | None:
        """Whether vLLM starts: one request of `length` fits."""
        return None if self.sequences is None or self.room is None else self.room > 0 and self.sequences >= 1


def gpu_named(text: str) -> Gpu:
    """Return the GPU that is meant: a name of the table, however it is written, or its memory in GiB.

    Raises:
        SettingError: it is neither.
    """
    for name, gib in GPUS_GIB.items():
        if _plain(text) == _plain(name):
            return Gpu(name, round(gib * GIB))
    try:
        memory = float(re.sub(r"\s*gi?b?$", "", text.strip(), flags=re.IGNORECASE))
    except ValueError:
        memory = 0
    if not 0 < memory < float("inf"):
        known = ", ".join(GPUS_GIB)
        raise SettingError(f"{text!r} is no GPU that is known here: give its memory in GiB, or one of {known}")
    return Gpu(f"a GPU of {memory:g} GiB", round(memory * GIB))


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|gb$|[^a-z0-9]", "", name.lower())


def model_length(config: Any) -> int:
    """Return the most tokens that the model is made for, as vLLM derives it from the config."""
    text = config.get_text_config()
    length = min((int(value) for key in _LENGTH_KEYS if (value := getattr(text, key, None))), default=2048)
    ropes = getattr(text, "rope_parameters", None) or {}
    ropes = [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]
    if any(rope.get("rope_type") == "longrope" for rope in ropes):
        return int(getattr(config, "original_max_position_embeddings", None) or length)
    if "gemma3" in (config.model_type or ""):
        return length  # its length is the scaled one
    factors = [rope.get("factor") or 1 for rope in ropes if rope.get("rope_type") not in _SCALED_ALREADY]
    return int(length * (factors[-1] if factors else 1))


def cache_of(config: Any, settings: Settings) -> Cache:
    """Return the KV cache that the model's attention needs.

    Raises:
        ConfigError: the config has no attention layers that are understood here.
    """
    text = config.get_text_config()
    if not getattr(text, "num_hidden_layers", None) or not getattr(_each_layer(text)[0], "num_attention_heads", None):
        raise ConfigError("the config has no attention heads and layers from which a KV cache could be reckoned")
    if getattr(text, "compress_ratios", None):
        raise ConfigError(f"the compressed KV cache of {text.model_type} cannot be reckoned from its config here")
    width = KV_CACHE_DTYPES[settings.kv_cache_dtype] or _cache_width(config, settings)
    found: Counter[Layers] = Counter()
    others: Counter[str] = Counter()
    shared = getattr(text, "num_kv_shared_layers", None) or 0  # the last ones, with the cache of earlier ones
    for kind, layer in list(zip(_kinds(text), _each_layer(text), strict=True))[: text.num_hidden_layers - shared]:
        match kind.removesuffix("_attention"):
            case "full" | "indexed":
                found[Layers("full", 1, _token_bytes(layer, settings, width))] += 1
            case "sliding" | "chunked" as name:
                window = getattr(layer, "sliding_window" if name == "sliding" else "attention_chunk_size", None)
                found[Layers(name if window else "full", 1, _token_bytes(layer, settings, width), window or 0)] += 1
            case "moe" | "mlp":
                pass
            case _:
                others[kind] += 1
    if not found:
        raise ConfigError("the config's layers keep no KV cache that is understood here")
    notes = [f"The state of {count} layers of the kind {kind} is not counted." for kind, count in others.items()]
    layers = (replace(layers, count=count) for layers, count in found.items())
    return Cache(tuple(layers), (*notes, *_uncounted(config)))


def _each_layer(text: Any) -> list[Any]:
    """Return the config of each layer; they differ in some models, such as Gemma 4."""
    if getattr(text, "is_heterogeneous", False):
        return list(text.per_layer_config)
    return [text] * int(text.num_hidden_layers)


def _kinds(text: Any) -> list[str]:
    """Return the kind of each layer, in transformers' words."""
    kinds = list(getattr(text, "layer_types", None) or [])
    if len(kinds) == text.num_hidden_layers:
        return kinds
    windowed = getattr(_each_layer(text)[0], "sliding_window", None)
    return ["sliding_attention" if windowed else "full_attention"] * text.num_hidden_layers


def _uncounted(config: Any) -> Iterator[str]:
    """Say what attention layers do not cover."""
    text = config.get_text_config()
    if not getattr(text, "layer_types", None) and any(getattr(text, name, None) for name in _STATEFUL):
        yield "The model seems to have recurrent layers: all are counted as attention."
    if getattr(text, "index_head_dim", None):
        yield "The index of its sparse attention is not counted."
    if getattr(config, "is_encoder_decoder", False):
        yield "Cross-attention is not counted."


def _cache_width(config: Any, settings: Settings) -> int:
    """Return the bytes of a value where KV_CACHE_DTYPE leaves them to the checkpoint."""
    quantized = getattr(config, "quantization_config", None) or {}
    quantized = quantized if isinstance(quantized, dict) else quantized.to_dict()
    if quantized.get("kv_cache_scheme") or str(quantized.get("kv_cache_quant_algo")).upper() == "FP8":
        return 1
    return 4 if settings.dtype in ("float", "float32") else 2


def _token_bytes(layer: Any, settings: Settings, width: int) -> int:
    """Return what a token takes in one layer on one GPU."""
    if getattr(layer, "kv_lora_rank", None):  # MLA: one latent vector, the same on each GPU
        return int(layer.kv_lora_rank + layer.qk_rope_head_dim) * width
    heads = next(
        value
        for name in ("num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_heads")
        if (value := getattr(layer, name, None))
    )
    head = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return int(2 * max(1, heads // settings.tensor_parallel_size) * head * width)


def overhead(config: Any, settings: Settings, max_num_seqs: int, max_num_batched_tokens: int) -> dict[str, int]:
    """Estimate what vLLM needs beside weights and KV cache, on one GPU, in bytes, by what it is for.

    A rule of thumb:

    - workspaces of kernels and libraries: 0.5 GiB, and as much again for communication between GPUs;
    - activations: for each token of the largest batch six hidden vectors and three of the widest inner layer, 16 bits;
    - sampling: for each request four float32 copies of the logits;
    - CUDA graphs: 0.25 MiB for each layer and captured size (51 sizes up to 512 tokens).

    The CUDA context is not among them: vLLM measures from when it is there, so it lies in what utilization leaves.
    """
    text = config.get_text_config()
    first = _each_layer(text)[0]
    hidden = getattr(first, "hidden_size", 0)
    experts = (getattr(first, "num_experts_per_tok", 0) or 0) * _number(getattr(first, "moe_intermediate_size", 0))
    inner = max(_number(getattr(first, "intermediate_size", 0)), experts) // settings.tensor_parallel_size
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    captured = sum(size <= max(2 * max_num_seqs, 1) for size in sizes)
    return {
        "workspaces": (GIB if settings.tensor_parallel_size > 1 else GIB // 2),
        "activations": max_num_batched_tokens * (6 * hidden + 3 * inner) * 2,
        "sampling": max_num_seqs * text.vocab_size * 4 * 4,
        "CUDA graphs": 0 if settings.enforce_eager else captured * (text.num_hidden_layers + 1) * GIB // 4096,
    }


def _number(value: Any) -> int:
    return max(value) if isinstance(value, (list, tuple)) else int(value or 0)


def fit(config: Any, weights_bytes: int, cache: Cache, settings: Settings, gpu: Gpu | None) -> Fit:
    """Return what the model needs on each GPU, and how that fits."""
    most = model_length(config)
    length = settings.max_model_len or most
    auto = length == AUTO_LENGTH
    length = most if auto else length
    seqs, batched = settings.with_defaults(gpu, length)
    in_flight = _BATCHES_IN_FLIGHT * batched
    share = weights_bytes // settings.tensor_parallel_size
    others = overhead(config, settings, seqs, batched)
    budget = None if gpu is None else int(gpu.memory_bytes * settings.gpu_memory_utilization)
    longest = None
    if budget is not None:
        room = budget - share - sum(others.values())
        longest = _longest(cache, room, max(most, length), in_flight)
        if auto:
            length = max(longest, 1)
    request = cache.request_bytes(length, in_flight)
    needed = share + sum(others.values()) + request
    return Fit(
        length=length,
        model_length=most,
        max_num_seqs=seqs,
        weights=share,
        overhead=others,
        request=request,
        budget=budget,
        longest=longest,
        smallest_gpu=int(needed / settings.gpu_memory_utilization),
    )


def _longest(cache: Cache, room: int, most: int, in_flight: int) -> int:
    """Return the longest request, up to `most`, that fits the room; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cache.request_bytes(middle, in_flight) <= room else (low, middle - 1)
    return low
