"""Whether a model fits a GPU, with the memory accounting of vLLM 0.32.

vLLM uses `memory * gpu_memory_utilization`. The KV cache gets what weights and overhead leave of it, and the start
fails unless one request of the maximum length fits there. The weights are counted (`builder.doctor.weights`), the KV
cache follows vLLM's accounting (`builder.doctor.kv_cache`), and the overhead is a rule of thumb (`overhead`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from builder.doctor.gpus import GIB, Gpu
from builder.doctor.kv_cache import KVCache, context_limit, default_max_model_len, layer_configs
from builder.doctor.settings import AUTO_LENGTH, Settings

# With asynchronous scheduling one batch is scheduled while another runs.
_BATCHES_IN_FLIGHT = 2


@dataclass(frozen=True)
class Fit:
    """The memory that a model needs and has on each GPU.

    Attributes:
        max_model_len: the setting, or vLLM's default for the model.
        context_limit: the longest context that vLLM allows for the model.
        max_num_seqs: the most concurrent requests.
        weights_bytes: the GPU's share of the weights.
        overhead_bytes: everything but weights and KV cache, by purpose.
        kv_cache_bytes_per_request: of a request of `max_model_len`.
        budget_bytes: the memory that vLLM uses; None without a GPU.
        max_model_len_that_fits: the longest single request that fits, at most `context_limit`; None without a GPU.
        min_gpu_memory_bytes: of the smallest GPU that fits one request of `max_model_len`.
    """

    max_model_len: int
    context_limit: int
    max_num_seqs: int
    weights_bytes: int
    overhead_bytes: dict[str, int] = field(compare=False)
    kv_cache_bytes_per_request: int
    budget_bytes: int | None
    max_model_len_that_fits: int | None
    min_gpu_memory_bytes: int

    @property
    def available_kv_cache_bytes(self) -> int | None:
        """What is left for the KV cache; negative if not even the weights fit."""
        used = self.weights_bytes + sum(self.overhead_bytes.values())
        return None if self.budget_bytes is None else self.budget_bytes - used

    @property
    def max_concurrency(self) -> float | None:
        """How many requests of `max_model_len` fit at the same time."""
        available = self.available_kv_cache_bytes
        return None if available is None else max(available, 0) / max(self.kv_cache_bytes_per_request, 1)

    @property
    def fits(self) -> bool | None:
        """Whether vLLM starts: one request of `max_model_len` fits."""
        available, concurrency = self.available_kv_cache_bytes, self.max_concurrency
        return None if available is None or concurrency is None else available > 0 and concurrency >= 1


def fit(config: Any, weights_bytes: int, cache: KVCache, settings: Settings, gpu: Gpu | None) -> Fit:
    """Return the memory that the model needs on each GPU, and whether it fits."""
    limit, default = context_limit(config), default_max_model_len(config)
    is_auto = settings.max_model_len == AUTO_LENGTH
    length = default if is_auto else settings.max_model_len or default
    seqs, batched_tokens = settings.batch_limits(gpu, length)
    in_flight_tokens = _BATCHES_IN_FLIGHT * batched_tokens
    share = weights_bytes // settings.tensor_parallel_size
    overheads = overhead(config, settings, seqs, batched_tokens)
    used = share + sum(overheads.values())
    budget = None if gpu is None else int(gpu.memory_bytes * settings.gpu_memory_utilization)
    longest = None
    if budget is not None:
        longest = _max_length(cache, budget - used, limit, in_flight_tokens)
        if is_auto:
            length = max(min(longest, default), 1)
    request = cache.request_bytes(length, in_flight_tokens)
    return Fit(
        max_model_len=length,
        context_limit=limit,
        max_num_seqs=seqs,
        weights_bytes=share,
        overhead_bytes=overheads,
        kv_cache_bytes_per_request=request,
        budget_bytes=budget,
        max_model_len_that_fits=longest,
        min_gpu_memory_bytes=int((used + request) / settings.gpu_memory_utilization),
    )


def overhead(config: Any, settings: Settings, max_num_seqs: int, max_num_batched_tokens: int) -> dict[str, int]:
    """Estimate the memory in addition to weights and KV cache, on one GPU, in bytes by purpose.

    A rule of thumb:

    - workspaces of kernels and libraries: 0.5 GiB, and another 0.5 GiB for communication between GPUs;
    - activations: for each token of the largest batch six hidden vectors and three of the widest inner layer, 16 bits;
    - sampling: for each request four float32 copies of the logits;
    - CUDA graphs: 0.25 MiB for each layer and captured size (51 sizes up to 512 tokens).

    The CUDA context is not included: vLLM measures after its creation, so the utilization's remainder covers it.
    """
    text = config.get_text_config()
    first = layer_configs(text)[0]
    hidden = getattr(first, "hidden_size", 0)
    experts = (getattr(first, "num_experts_per_tok", 0) or 0) * _largest(getattr(first, "moe_intermediate_size", 0))
    inner = max(_largest(getattr(first, "intermediate_size", 0)), experts) // settings.tensor_parallel_size
    capture_sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    captured = sum(size <= max(2 * max_num_seqs, 1) for size in capture_sizes)
    return {
        "workspaces": (GIB if settings.tensor_parallel_size > 1 else GIB // 2),
        "activations": max_num_batched_tokens * (6 * hidden + 3 * inner) * 2,
        "sampling": max_num_seqs * text.vocab_size * 4 * 4,
        "CUDA graphs": 0 if settings.enforce_eager else captured * (text.num_hidden_layers + 1) * GIB // 4096,
    }


def _largest(value: Any) -> int:
    return max(value) if isinstance(value, (list, tuple)) else int(value or 0)


def _max_length(cache: KVCache, available_bytes: int, limit: int, in_flight_tokens: int) -> int:
    """Return the longest request, up to `limit`, whose KV cache fits; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        fits = cache.request_bytes(middle, in_flight_tokens) <= available_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
