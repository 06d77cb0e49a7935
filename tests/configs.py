"""The `config.json` of public models, reduced to what determines their size, and their published sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_BF16 = {"torch_dtype": "bfloat16"}


@dataclass(frozen=True)
class Published:
    """A model's config, and its published sizes.

    Attributes:
        config: its config.json.
        parameters: number of parameters, as the hub shows it.
        token_bytes: KV cache of one token over all layers, in bytes, as vLLM counts it.
        model_length: the maximum length that vLLM derives, in tokens.
    """

    config: dict[str, Any]
    parameters: int
    token_bytes: int
    model_length: int


PHI_4_4BIT = Published(  # unsloth/phi-4-bnb-4bit
    {
        **_BF16,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "vocab_size": 100352,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rope_theta": 250000,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "pad_token_id": 100349,
        "bos_token_id": 100257,
        "eos_token_id": 100265,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "llm_int8_skip_modules": None,
        },
    },
    parameters=14_659_507_200,
    token_bytes=2 * 10 * 128 * 2 * 40,
    model_length=16384,
)
LLAMA_3_1_8B = Published(
    {
        **_BF16,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
    },
    parameters=8_030_261_248,
    token_bytes=131072,
    model_length=131072,
)
QWEN3_30B_A3B = Published(
    {
        **_BF16,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    parameters=30_532_122_624,
    token_bytes=98304,
    model_length=40960,
)
GPT_OSS_20B = Published(
    {
        **_BF16,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "initial_context_length": 4096,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "sliding_window": 128,
        "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    },
    parameters=20_914_757_184,
    token_bytes=49152,
    model_length=131072,
)
GEMMA_3_4B = Published(
    {
        **_BF16,
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
            "sliding_window_pattern": 6,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "vocab_size": 262208,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    parameters=4_300_079_472,
    token_bytes=139264,
    model_length=131072,
)
DEEPSEEK_V2_LITE = Published(
    {
        **_BF16,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "vocab_size": 102400,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "tie_word_embeddings": False,
    },
    parameters=15_706_484_224,
    token_bytes=27 * 576 * 2,
    model_length=163840,
)

PUBLISHED = {
    "phi-4 4-bit": PHI_4_4BIT,
    "Llama 3.1 8B": LLAMA_3_1_8B,
    "Qwen3 30B-A3B": QWEN3_30B_A3B,
    "gpt-oss 20B": GPT_OSS_20B,
    "Gemma 3 4B": GEMMA_3_4B,
    "DeepSeek V2 Lite": DEEPSEEK_V2_LITE,
}
