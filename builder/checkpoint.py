"""Checks that a directory has a loadable model, without loading its weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from builder import layout
from builder.errors import DestinationError, IntegrityError, MissingPackageError, UnsupportedModelError
from builder.manifest import model_files

_LENGTH = struct.Struct("<Q")


def check(directory: Path) -> None:
    """Check the shards against their headers and the index, and load configuration and tokenizer.

    Raises:
        IntegrityError: files are missing or damaged, a line for each.
        UnsupportedModelError: there are no weights, or the configuration or the tokenizer do not load.
        MissingPackageError: transformers is not installed.
        DestinationError: the directory does not exist.
    """
    if not directory.is_dir():
        raise DestinationError(f"{directory} is not a directory")
    paths = model_files(directory)
    if not any(layout.is_weights(path) for path in paths):
        raise UnsupportedModelError(f"{directory} has no weights (safetensors or PyTorch)")
    tensors: dict[str, set[str]] = {}
    problems = []
    for path in paths:
        if path.endswith(".safetensors"):
            try:
                tensors[path] = _read_tensor_names(directory / path)
            except ValueError as error:
                problems.append(f"{path}: {error}")
    for path in layout.weight_indexes(paths):
        problems += _check_index(directory, path, tensors)
    if problems:
        raise IntegrityError("\n".join(problems))
    if set(layout.CONFIG_FILES).isdisjoint(paths):
        raise UnsupportedModelError(f"{directory} has no config.json")
    if "config.json" in paths:
        _load(directory)


def _read_tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file; raise ValueError if the file is damaged.

    The format: 8 bytes with the header's length, the header in JSON, then the data, up to the end of the file.
    https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else size
        if _LENGTH.size + length > size:
            raise ValueError(f"truncated, or not a safetensors file ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = _LENGTH.size + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError):
            raise ValueError("invalid safetensors header") from None
    if size != end:
        raise ValueError(f"{'truncated' if size < end else 'too long'}, {size:,} bytes instead of {end:,}")
    return set(header)


def _check_index(directory: Path, index: str, tensors: Mapping[str, set[str]]) -> Iterator[str]:
    """Yield what is wrong with the shards that an index names."""
    try:
        shard_of = layout.read_index(directory / index)
    except ValueError:
        yield f"{index}: not an index of weights"
        return
    for shard in sorted(set(shard_of.values())):
        if not (directory / shard).is_file():
            yield f"{shard}: missing, but named in {index}"
        elif shard in tensors:
            missing = sorted({name for name, place in shard_of.items() if place == shard} - tensors[shard])
            if missing:
                yield f"{shard}: missing {missing[0]}, which {index} names ({len(missing)} in total)"


def _load(directory: Path) -> None:
    """Load configuration and tokenizer; a model's own code is not run, so it is not checked."""
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError:
        raise MissingPackageError("checking configuration and tokenizer needs transformers") from None
    for name, loader in (("configuration", AutoConfig), ("tokenizer", AutoTokenizer)):
        try:
            loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            if "trust_remote_code" in str(error):
                continue
            reason = " ".join(str(error).split())[:200]
            raise UnsupportedModelError(f"{directory}: the {name} does not load: {reason}") from error
