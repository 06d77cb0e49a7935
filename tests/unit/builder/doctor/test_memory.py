"""Whether a model fits a GPU: lengths, shares, defaults and the overhead."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from builder.doctor import kv_cache, memory, settings, weights
from builder.doctor.gpus import GIB, Gpu, find_gpu
from builder.doctor.settings import Settings
from builder.errors import SettingError
from tests.configs import (
    DEEPSEEK_V2_LITE,
    GEMMA_3_4B,
    GPT_OSS_20B,
    LLAMA_3_1_8B,
    PHI_4_4BIT,
    QWEN3_30B_A3B,
    Published,
)

RTX_4090 = find_gpu("RTX 4090")


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


def test_the_longest_length_is_at_most_the_models_limit(
    read: Callable[..., Any], weigh: Callable[..., weights.Weights]
) -> None:
    fit = fit_of(PHI_4_4BIT, read, weigh, max_model_len=10**6)

    assert fit.fits is False
    assert fit.max_model_len_that_fits == fit.context_limit == 16384


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


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A100", "A100-80"),
        ("A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("H100 SXM", "H100"),
        ("H100 PCIe", "H100"),
        ("L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("RTX 6000 Ada", "RTX 6000 Ada"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_a_gpu_is_found_by_the_names_of_the_driver_and_the_platform(text: str, name: str) -> None:
    assert find_gpu(text).name == name


@pytest.mark.parametrize("text", ["24", "24GB", "24 GiB", "24.0"])
def test_a_gpu_may_be_given_by_its_memory(text: str) -> None:
    assert find_gpu(text).memory_bytes == 24 * GIB


@pytest.mark.parametrize("text", ["abacus", "0", "-3", "inf", ""])
def test_the_error_for_an_unknown_gpu_lists_the_known_ones(text: str) -> None:
    with pytest.raises(SettingError, match="RTX 4090"):
        find_gpu(text)
