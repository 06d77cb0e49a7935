"""Decides whether vLLM keeps what it measured of the GPU's memory, its startup plan, for later starts."""

from __future__ import annotations

import os

from engine.config.vllm_flags import Flags

ENABLE = "VLLM_ENABLE_STARTUP_PLAN"
# Flags that change how much of the GPU's memory the KV cache may have, but not the hash by which vLLM finds a plan
# (0.32, `VllmConfig.compute_hash`). With another value than it was made with, a plan would be wrong.
NOT_IN_HASH = frozenset(
    {
        # What the engine may have of the memory
        "gpu_memory_utilization",
        # The model and its inputs, which the profile runs
        "hf_config_path",
        "hf_overrides",
        "convert",
        "pooler_config",
        "diffusion_config",
        "enable_chunked_prefill",
        "disable_chunked_mm_input",
        "enable_mm_embeds",
        "limit_mm_per_prompt",
        "media_io_kwargs",
        "mm_device_do_normalize",
        "mm_encoder_attn_backend",
        "mm_encoder_attn_dtype",
        "mm_encoder_fp8_scale_path",
        "mm_encoder_only",
        "mm_encoder_tp_mode",
        "mm_ipc_gpu_memory_gb",
        "mm_processor_device",
        "mm_processor_kwargs",
        "mm_tensor_ipc",
        "skip_mm_profiling",
        "video_pruning_method",
        "video_pruning_rate",
        "speculative_config",
        "spec_method",
        "spec_model",
        "spec_tokens",
        # Sampling, of which the profile runs one step
        "enable_trace_replay",
        "logits_processors",
        "logprobs_mode",
        "return_sampling_mask",
        "use_fp64_gumbel",
        # What is loaded and allocated besides
        "disable_custom_all_reduce",
        "distributed_executor_backend",
        "enable_flashinfer_autotune",
        "kv_sharing_fast_prefill",
        "load_format",
        "model_loader_extra_config",
        "scheduler_cls",
        "specialize_active_lora",
        "worker_cls",
        "worker_extension_cls",
    }
)


def enable(flags: Flags) -> None:
    """Let vLLM make and use plans, unless a flag is set that a plan should depend on and does not.

    What the user says stands. vLLM reads the variable when it measures the memory.
    """
    if NOT_IN_HASH.isdisjoint(flags.values):
        os.environ.setdefault(ENABLE, "1")
