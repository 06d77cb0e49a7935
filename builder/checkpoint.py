"""Whether a directory holds a model that can be loaded, as far as can be told without loading its weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from builder import layout
from builder.errors import MissingPackageError, UnservableError, WrongFilesError
from builder.manifest import present

_LENGTH = struct.Struct("<Q")


def check(directory: Path) -> None:
    """Check that every shard is as its header and the index say, and that configuration and tokenizer load.

    Raises:
        WrongFilesError: files are missing or wrong, a line for each.
        UnservableError: there are no weights, or the configuration or the tokenizer do not load.
        MissingPackageError: what loads them is not installed.
    """
    paths = present(directory)
    if not any(layout.is_weights(path) for path in paths):
        raise UnservableError(f"{directory} holds no weights (safetensors or PyTorch)")
    tensors: dict[str, set[str]] = {}
    wrong = []
    for path in paths:
        if path.endswith(".safetensors"):
            try:
                tensors[path] = _tensors(directory / path)
            except ValueError as error:
                wrong.append(f"{path}: {error}")
    for path in paths:
        if path.endswith(".index.json"):
            wrong += _against_index(directory, path, tensors)
    if wrong:
        raise WrongFilesError("\n".join(wrong))
    if "config.json" in paths:
        _load(directory)
    elif "params.json" not in paths:  # Mistral's own format
        raise UnservableError(f"{directory} holds no config.json")


def _tensors(path: Path) -> set[str]:
    """The names of the file's tensors, as its header has them.

    The format: 8 bytes with the header's length, the header in JSON, and behind it the data, to the last byte.
    https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else size
        if _LENGTH.size + length > size:
            raise ValueError(f"cut short, or no safetensors file ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = _LENGTH.size + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError):
            raise ValueError("its header is not one of safetensors") from None
    if size != end:
        raise ValueError(f"{'cut short' if size < end else 'too long'}, {size:,} bytes of {end:,}")
    return set(header)


def _against_index(directory: Path, index: str, tensors: Mapping[str, set[str]]) -> Iterator[str]:
    """What is wrong with the shards that an index names."""
    try:
        places: dict[str, str] = json.loads((directory / index).read_bytes())["weight_map"]
    except (ValueError, LookupError, TypeError):
        yield f"{index}: not an index of weights"
        return
    beside = Path(index).parent
    for shard in sorted(set(places.values())):
        path = str(beside / shard)
        if not (directory / path).is_file():
            yield f"{path}: missing, and {index} names it"
            continue
        absent = sorted(
            name for name, place in places.items() if place == shard and name not in tensors.get(path, name)
        )
        if path in tensors and absent:
            yield f"{path}: without {absent[0]}, which {index} has in it ({len(absent)} such tensors)"


def _load(directory: Path) -> None:
    """Load configuration and tokenizer; code that a model brings along is not run, and so not checked."""
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError:
        raise MissingPackageError("checking configuration and tokenizer needs transformers") from None
    for what, kind in (("configuration", AutoConfig), ("tokenizer", AutoTokenizer)):
        try:
            kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            if "trust_remote_code" in str(error):
                continue
            reason = " ".join(str(error).split())[:200]
            raise UnservableError(f"{directory}: its {what} does not load: {reason}") from error
