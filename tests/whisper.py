"""A transcription model of 2 MB: a Whisper with random weights, made here as nothing can be downloaded.

It hears nothing: what it writes follows from the weights, and from the audio's length. That is enough to compare two
answers of one engine.
"""

from __future__ import annotations

import io
import math
import subprocess
import sys
import wave
from array import array
from pathlib import Path

from tests.processes import ROOT

# A longer clip is cut into pieces: Whisper's own 30 s would only make the tests slower.
CLIP_S = 2
POSITIONS = 64
_TIMESTAMPS = 1501
# What vLLM's prompts for the model consist of.
_SPECIAL = ["<|endoftext|>", "<|startoftranscript|>"]
_TASKS = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|prev|>", "<|nospeech|>",
          "<|notimestamps|>"]  # fmt: skip
_TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps in the sun"


def tone(duration_s: float, rate_hz: int = 16_000, pitch_hz: float = 440) -> bytes:
    """Return a tone as a WAV file; by default, of the rate that the model hears at."""
    samples = (int(20_000 * math.sin(2 * math.pi * pitch_hz * n / rate_hz)) for n in range(int(duration_s * rate_hz)))
    file = io.BytesIO()
    with wave.open(file, "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(2)
        audio.setframerate(rate_hz)
        audio.writeframes(array("h", samples).tobytes())
    return file.getvalue()


def transcription_model(directory: Path) -> str:
    """Make the model in a separate process, as it imports torch and takes seconds; return the directory."""
    subprocess.run([sys.executable, "-m", "tests.whisper", str(directory)], cwd=ROOT, check=True, capture_output=True)
    return str(directory)


def _main(directory: Path) -> None:
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([_TEXT], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(directory))
    special = [*_SPECIAL, *(f"<|{language}|>" for language in LANGUAGES), *_TASKS]
    whisper = WhisperTokenizerFast(
        vocab=str(directory / "vocab.json"), merges=str(directory / "merges.txt"), bos_token=special[0]
    )
    whisper.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    times = [f"<|{index * 0.02:.2f}|>" for index in range(_TIMESTAMPS)]
    whisper.add_tokens([AddedToken(token, special=False, normalized=False) for token in times])
    whisper.save_pretrained(directory)
    WhisperFeatureExtractor(chunk_length=CLIP_S).save_pretrained(directory)
    end, start = whisper.convert_tokens_to_ids(_SPECIAL)
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(whisper), d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=50 * CLIP_S,
            max_target_positions=POSITIONS, pad_token_id=end, bos_token_id=end, eos_token_id=end,
            decoder_start_token_id=start, init_std=0.3, suppress_tokens=[], begin_suppress_tokens=[],
        )
    )  # fmt: skip
    model.generation_config.max_length = POSITIONS
    model.to(torch.bfloat16).save_pretrained(directory)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
