"""The memory that a model's weights need, from its config.json.

transformers builds the model on torch's `meta` device, where tensors have shapes but no data: the parameters are
counted as each architecture's code declares them, without a list of architectures. A model's own code is not run: for
an architecture that transformers does not know, the size is that of the safetensors files next to the config, if any.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from builder.doctor.settings import DTYPES
from builder.errors import ConfigError, UnknownSizeError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_HALF_BYTES = 2

# vLLM's QUANTIZATION for a checkpoint that is not quantized: the quantization config after loading.
_FP8: dict[str, Any] = {"quant_method": "fp8"}
ONLINE: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": _FP8,
    "fp8_per_tensor": _FP8,
    "fp8_per_block": _FP8,
    "fp8_per_channel": _FP8,
    "int8_per_channel_weight_only": _FP8,  # the same width
    "mxfp8": {"quant_method": "modelopt", "quant_algo": "MXFP8"},
    "nvfp4_per_token": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
}


@dataclass(frozen=True)
class Weights:
    """A model's weights.

    Attributes:
        parameters: their number; None if the size is that of the files.
        size_bytes: in memory, on all GPUs together.
        stored_bytes: of the files, which may be wider: they are not yet quantized or converted.
        quantization: the method, or None.
        notes: what is not counted, a sentence each.
    """

    parameters: int | None
    size_bytes: int
    stored_bytes: int
    quantization: str | None
    notes: tuple[str, ...] = ()


def read_config(directory: Path) -> tuple[Any, bool]:
    """Return transformers' config of the model in `directory`, and whether transformers knows its architecture.

    Raises:
        ConfigError: config.json cannot be read, or is not the config of a model.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    file = directory / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    if not isinstance(raw, dict) or not ({"model_type", "architectures"} & raw.keys()):
        raise ConfigError(f"{file} is not the config of a model: it has neither model_type nor architectures")
    logging.set_verbosity_error()  # its warnings matter only to those who run the model
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True), True
    except (KeyError, OSError, ValueError):
        return _plain_config(raw), False
    except Exception as error:  # noqa: BLE001 (each config class raises its own errors)
        raise ConfigError(f"transformers rejects {file}: {' '.join(str(error).split())[:300]}") from None


def _plain_config(raw: dict[str, Any]) -> Any:
    """Return a generic config with the values of a config.json; those of its text model take precedence."""
    from transformers import PreTrainedConfig

    own = {name: raw.get(name) for name in ("architectures", "model_type")}
    values = {**raw, **(raw.get("text_config") or {}), **own}
    config = PreTrainedConfig(dtype=values.get("dtype") or values.get("torch_dtype"))
    config.rope_parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    for name in values.keys() - {"dtype", "torch_dtype", "text_config", "rope_parameters", "rope_scaling"}:
        setattr(config, name, values[name])
    return config


def weights(
    directory: Path, config: Any, *, known: bool, dtype: str = "auto", quantization: str | None = None
) -> Weights:
    """Return the size of the weights of the model in `directory`.

    Args:
        directory: with config.json, and perhaps the weights.
        config: from `read_config`.
        known: whether transformers knows the architecture.
        dtype: vLLM's DTYPE, a key of DTYPES.
        quantization: vLLM's QUANTIZATION, for a checkpoint that is not quantized.

    Raises:
        UnknownSizeError: neither transformers nor files give the size.
    """
    quantized = stored = _quantization(config)
    notes: list[str] = []
    if quantized is None and quantization is not None:
        quantized = ONLINE.get(quantization)
        if quantized is None:
            notes.append(f"QUANTIZATION={quantization} is unknown: the weights are counted as not quantized.")
    method = str(quantized["quant_method"]) if quantized else None
    files = checkpoint_bytes(directory)
    model = _on_meta(config) if known else None
    width = _bytes_per_parameter(quantized) if quantized else None
    if model is None or (quantized and width is None):
        if files is None:
            raise UnknownSizeError(
                f"transformers does not know {_architecture(config)}, and there are no safetensors files"
                if model is None
                else f"the size of {method} weights is unknown, and there are no safetensors files"
            )
        unknown = _architecture(config) if model is None else f"{method} weights"
        return Weights(None, files, files, method, (*notes, f"The size is that of the files ({unknown}: unknown)."))
    stored_width = getattr(config.dtype or config.get_text_config().dtype, "itemsize", _HALF_BYTES)
    full_width = DTYPES[dtype] or min(_HALF_BYTES, stored_width)
    return Weights(
        sum(parameter.numel() for parameter in model.parameters()),
        _size_bytes(model, quantized, full_width),
        _size_bytes(model, stored, stored_width),
        method,
        tuple(notes),
    )


def _size_bytes(model: Any, quantized: Mapping[str, Any] | None, full_width: int) -> int:
    """Return the size of the parameters, those that are not quantized with `full_width` bytes each."""
    width = _bytes_per_parameter(quantized) if quantized else None
    names = _quantized_parameters(model, quantized) if quantized else frozenset()
    size: float = sum(
        parameter.numel() * (width if width and name in names else full_width)
        for name, parameter in model.named_parameters()  # tied weights are listed once
    )
    return round(size)


def _quantized_parameters(model: Any, quantized: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the quantized parameters: of linear layers and experts, except the output layer."""
    import torch

    keys = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")
    skipped = [str(pattern) for key in keys for pattern in quantized.get(key) or ()]
    head = model.get_output_embeddings()
    names = {name for name, parameter in model.named_parameters() if ".experts." in name and parameter.ndim == 3}  # noqa: PLR2004 (all experts in one tensor)
    if quantized["quant_method"] != "mxfp4":  # quantizes only experts
        modules = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        names |= {f"{name}.weight" for name, module in modules if module is not head}
    return frozenset(name for name in names if not any(_matches(pattern, name) for pattern in skipped))


def checkpoint_bytes(directory: Path) -> int | None:
    """Return the total size of the safetensors files in `directory`; None if there are none.

    `consolidated*` files (Mistral's format) are the same weights a second time.
    """
    files = [file for file in directory.glob("*.safetensors") if not file.name.startswith("consolidated")]
    return sum(file.stat().st_size for file in files) or None


def _on_meta(config: Any) -> Any | None:
    """Return the model on the meta device; None if transformers cannot build it."""
    import torch
    import transformers

    named = getattr(transformers, _architecture(config), None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        builders = [named._from_config]  # type: ignore[attr-defined]  # noqa: SLF001 (as the Auto classes do)
    else:
        builders = [transformers.AutoModelForCausalLM.from_config, transformers.AutoModelForImageTextToText.from_config]
    for build in builders:
        with torch.device("meta"), contextlib.suppress(Exception):  # such as a missing package
            return build(config)
    return None


def _architecture(config: Any) -> str:
    return str((config.architectures or [config.model_type or "the model"])[0])


def _quantization(config: Any) -> dict[str, Any] | None:
    """Return the checkpoint's quantization as a dict with quant_method, None if it is not quantized."""
    found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    found = found or getattr(config.get_text_config(), "quantization_config", None)
    if not found:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    method = str(found.get("quant_method", "")).replace("compressed_tensors", "compressed-tensors")
    return {**found, "quant_method": method or ("bitsandbytes" if "load_in_4bit" in found else "unknown")}


def _bytes_per_parameter(quantized: Mapping[str, Any]) -> float | None:
    """Return the size of a quantized parameter, with its share of scales and zero points; None if unknown."""
    width: float | None = None
    match quantized["quant_method"]:
        case "bitsandbytes":
            # A float32 scale (absmax) per 64 values: vLLM's plugin reverts double quantization when it loads.
            width = 0.5 + 4 / 64 if quantized.get("load_in_4bit") or quantized.get("_load_in_4bit") else 1.0
        case "fp8" | "fbgemm_fp8" | "experts_int8":
            rows, columns = quantized.get("weight_block_size") or (128, 128)
            width = 1 + 4 / (rows * columns)
        case "awq" | "gptq" | "auto_awq" | "auto_gptq":
            if bits := int(quantized.get("bits") or 0) / 8:  # and for each group a float16 scale and a zero point
                width = bits + _per_group(2 + bits, quantized.get("group_size"))
        case "mxfp4":
            width = 0.5 + 1 / 32
        case "compressed-tensors":
            groups = (quantized.get("config_groups") or {}).values()
            schemes = [scheme for group in groups if (scheme := group.get("weights"))]
            width = max((_compressed(scheme) for scheme in schemes), default=None)
        case "modelopt":
            width = {"FP8": 1.0, "MXFP8": 1 + 1 / 32, "NVFP4": 0.5 + 1 / 16}.get(str(quantized.get("quant_algo")))
    return width


def _compressed(scheme: Mapping[str, Any]) -> float:
    scale = 1 if scheme.get("type") == "float" and scheme["num_bits"] == 4 else 2  # noqa: PLR2004 (NVFP4: FP8 scales)
    return float(scheme["num_bits"] / 8 + _per_group(scale, scheme.get("group_size")))


def _per_group(size: float, group_size: int | None) -> float:
    """Return a value's share of its group's metadata; it is negligible for one group per channel."""
    return size / group_size if group_size and group_size > 0 else 0.0


def _matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches: a regular expression after `re:`, a wildcard, or a part of the name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name.rpartition(".")[0]) is not None
    return fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*")
