"""The vLLM settings on which memory depends: their values, defaults and texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from builder.doctor.gpus import GIB, Gpu
from builder.errors import SettingError

# vLLM's DTYPE: bytes of a value that is not quantized; 0 means the config's dtype, but at most 2 bytes.
DTYPES = {"auto": 0, "half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4}
# vLLM's KV_CACHE_DTYPE: bytes of a value in the KV cache; 0 means as wide as the weights.
KV_CACHE_DTYPES = {"auto": 0, "half": 2, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
# MAX_MODEL_LEN=auto: the longest that fits.
AUTO_LENGTH = -1
# vLLM's `CacheConfig`.
GPU_MEMORY_UTILIZATION = 0.92
# vLLM's `EngineArgs.get_batch_defaults` distinguishes GPUs by their memory.
_LARGE_BYTES = 70 * GIB
_LARGEST_BYTES = 160 * GIB

_MULTIPLES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_BOOLEANS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


@dataclass(frozen=True)
class Settings:
    """vLLM's settings on which memory depends; None means vLLM's default."""

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    enforce_eager: bool = False

    def batch_limits(self, gpu: Gpu | None, max_model_len: int) -> tuple[int, int]:
        """Return max_num_seqs and max_num_batched_tokens with vLLM's defaults for this GPU.

        vLLM does not count an A100 as a large GPU, whatever its memory.
        """
        memory_bytes = 0 if gpu is None or "a100" in gpu.name.lower() else gpu.memory_bytes
        seqs = self.max_num_seqs or (1024 if memory_bytes >= _LARGE_BYTES else 256)
        tokens = self.max_num_batched_tokens
        if tokens is None:
            default = 16384 if memory_bytes >= _LARGEST_BYTES else 8192 if memory_bytes >= _LARGE_BYTES else 2048
            tokens = min(default, seqs * max_model_len)
        return (seqs if self.max_num_seqs else min(seqs, tokens)), tokens


def read_settings(texts: Mapping[str, str]) -> Settings:
    """Return the settings from their texts by name; other names are ignored.

    Raises:
        SettingError: a text is invalid.
    """
    values: dict[str, Any] = {}
    for name, (parse, allowed) in _PARSERS.items():
        text = texts.get(name)
        if text is None:
            continue
        try:
            values[name] = parse(text)
        except (KeyError, ValueError, OverflowError):
            raise SettingError(f"invalid {name.upper()}={text!r}: must be {allowed}") from None
    return Settings(**values)


def _positive(number: int) -> int:
    """Return the number; raise ValueError if it is less than 1."""
    if number < 1:
        raise ValueError(number)
    return number


def _count(text: str) -> int:
    return _positive(int(text))


def _tokens(text: str) -> int:
    """Return a number of tokens as vLLM's `human_readable_int` parses it: `8192`, `16k` (16,000), `16K` (16,384)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT])", text.strip())
    if match is None:
        return _count(text)
    number, suffix = match.groups()
    # Only decimal multiples may have a fraction.
    return _positive(int((float if suffix.islower() else int)(number) * _MULTIPLES[suffix]))


def _length(text: str) -> int:
    """Return a number of tokens, or AUTO_LENGTH for `auto` and -1."""
    return AUTO_LENGTH if text.strip().lower() in ("auto", "-1") else _tokens(text)


def _fraction(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise ValueError(text)
    return number


def _one_of(names: Mapping[str, Any]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        names[text]
        return text

    return parse


_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_model_len": (_length, "a number of tokens, such as 8192 or 16k, or auto"),
    "max_num_seqs": (_count, "an integer of at least 1"),
    "max_num_batched_tokens": (_tokens, "a number of tokens, such as 8192 or 8k"),
    "gpu_memory_utilization": (_fraction, "a number above 0 and up to 1"),
    "tensor_parallel_size": (_count, "an integer of at least 1"),
    "dtype": (_one_of(DTYPES), "one of " + ", ".join(DTYPES)),
    "kv_cache_dtype": (_one_of(KV_CACHE_DTYPES), "one of " + ", ".join(KV_CACHE_DTYPES) + " for the doctor"),
    "quantization": (str, "a method of vLLM"),
    "enforce_eager": (lambda text: _BOOLEANS[text.lower()], "true or false"),
}
