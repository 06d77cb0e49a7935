"""A model for realtime transcription: a Voxtral of a few layers, whose weights vLLM makes up (`LOAD_FORMAT=dummy`).

Nothing can be downloaded here. It hears nothing, but takes audio and writes text while it comes, as the real one does.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

# What a worker needs to serve it: its files are in Mistral's own format.
SETTINGS = {"CONFIG_FORMAT": "mistral", "TOKENIZER_MODE": "mistral", "LOAD_FORMAT": "dummy"}
RATE_HZ = 16_000
_SPECIAL_TOKENS = 64
_VOCABULARY = 256 + _SPECIAL_TOKENS
_SPECTROGRAM = {"num_mel_bins": 128, "hop_length": 160, "window_size": 400}
_LAYERS = {"dim": 64, "n_layers": 1, "head_dim": 32, "hidden_dim": 128, "n_heads": 2, "n_kv_heads": 2,
           "rope_theta": 10_000.0, "norm_eps": 1e-5, "vocab_size": _VOCABULARY}  # fmt: skip


def realtime_model(directory: Path) -> str:
    """Make the model; return the directory."""
    from mistral_common.tokens.tokenizers.base import SpecialTokens

    directory.mkdir(parents=True, exist_ok=True)
    special = [{"rank": rank, "token_str": str(token), "is_control": True} for rank, token in enumerate(SpecialTokens)]
    tokenizer = {
        "config": {
            "pattern": r"\s+|\S+",
            "num_vocab_tokens": 256,
            "default_vocab_size": _VOCABULARY,
            "default_num_special_tokens": _SPECIAL_TOKENS,
            "version": "v13",
        },
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
            for byte in range(256)
        ],
        "special_tokens": special,
        "audio": {
            "sampling_rate": RATE_HZ,
            "frame_rate": 12.5,
            "audio_encoding_config": _SPECTROGRAM,
            "transcription_format": "streaming",
            "transcription_delay_ms": 480.0,
            "streaming_look_ahead_ms": 2.5,
            "streaming_look_back_ms": 52.5,
            "streaming_n_left_pad_tokens": 32,
        },
    }
    encoder = {
        **_LAYERS,
        "audio_encoding_args": {**_SPECTROGRAM, "sampling_rate": RATE_HZ, "global_log_mel_max": 1.5},
        "causal": True,
        "pos_embed": "rope",
        "sliding_window": 750,
    }
    parameters = {
        **_LAYERS,
        "tied_embeddings": True,
        "max_position_embeddings": 1024,
        "ada_rms_norm_t_cond": True,
        "ada_rms_norm_t_cond_dim": 32,
        "multimodal": {
            "whisper_model_args": {"encoder_args": encoder, "downsample_args": {"downsample_factor": 4}},
        },
    }
    (directory / "tekken.json").write_text(json.dumps(tokenizer))
    (directory / "params.json").write_text(json.dumps(parameters))
    return str(directory)
