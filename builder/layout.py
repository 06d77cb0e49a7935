"""Places, names and patterns of files that the builder and the worker share: of models and of compiled code.

Standard library only, and no other module of the builder: the worker imports it at startup.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

# Written last by a download: a directory of ours without it may be incomplete.
MANIFEST = "model-manifest.json"
# Incomplete files of a download, and its lock.
PARTIAL_DIR = ".unfinished"
LOCK = ".lock"
# The end of the name of a file that is not complete.
PARTIAL = ".partial"
# Downloads below a directory of compiled code, which are none and may be large.
_DOWNLOADS = "vllm/assets/"
# No loader accepts a directory without one of these; params.json is Mistral's.
CONFIG_FILES = ("config.json", "params.json")

# Mistral numbers its versions, as in `tokenizer.model.v3`.
_TOKENIZER = re.compile(r"tokenizer\.json|tekken\.json|vocab\.(json|txt)|.+\.(model|tiktoken)|.+\.model\.v\d+\w*")
# In order of preference: a repository often has the same weights in several formats. vLLM loads any `*.bin`, so the
# names that transformers writes are preferred, but not required.
_WEIGHT_FORMATS = (
    re.compile(r"(?!consolidated)[^/]+\.safetensors"),
    re.compile(r"consolidated[^/]*\.safetensors"),  # Mistral's format
    re.compile(r"(?:pytorch_)?model[^/]*\.bin"),
    re.compile(r"[^/]+\.bin"),
    re.compile(r"[^/]+\.pth?"),
)
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}
# Training state, and adapters, which are not models.
_NOT_WEIGHTS = re.compile(r"(?:training_args|optimizer|scheduler|rng_state|scaler|adapter_model).*")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")
_INDEX = re.compile(r"(?P<weights>.+\.\w+)\.index\.json")
# Modules of sentence-transformers, such as `2_Dense/model.safetensors`.
_MODULE = re.compile(r"\d+_\w+/.+")
# Directories with the same model in other formats, training runs, and pictures of the model card.
_IGNORED_DIRS = re.compile(
    r"original|onnx|openvino|metal|coreml|gguf|tflite|runs|logs|assets|images|figures|checkpoint-\d+|\..+"
)
_TEXT_SUFFIXES = {".json", ".jinja", ".txt", ".py", ".vocab", ".yaml", ".yml"}
_LICENSES = re.compile(r"(?:LICEN[SC]E|NOTICE|USE_POLICY|COPYING)[^/]*", re.IGNORECASE)


def required_files(paths: Iterable[str]) -> list[str]:
    """Return the files of a repository that serving needs, sorted.

    These are one set of weights, the configuration, the tokenizer and the license. If there are no weights that vLLM
    loads, the result has none.
    """
    paths = [path for path in paths if "/" not in path or not _IGNORED_DIRS.fullmatch(path.split("/")[0])]
    files = {path for path in paths if _is_text(path) and path != MANIFEST}
    if weight_format := _find_format(paths):
        files.update(_weights(paths, weight_format), _indexes(paths, weight_format))
    return sorted(files)


def weight_indexes(paths: list[str]) -> list[str]:
    """Return the shard indexes of the weights that are loaded, not those of other formats of the same weights."""
    weight_format = _find_format(paths)
    return _indexes(paths, weight_format) if weight_format else []


def read_index(file: Path) -> dict[str, str]:
    """Return the shard of each tensor in an index; raise ValueError if the file is not an index of weights."""
    index = json.loads(file.read_bytes())
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not shard_of or not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise ValueError(f"{file} is not an index of weights")
    return shard_of


def is_weights(path: str) -> bool:
    """Return whether this is the name of a file with weights."""
    pure = PurePosixPath(path)
    return pure.suffix in _WEIGHT_SUFFIXES and _NOT_WEIGHTS.fullmatch(pure.name) is None


def is_complete(directory: Path) -> bool:
    """Return whether a directory without a manifest has configuration, tokenizer and one complete set of weights.

    Only file names and the index are checked, not the contents.
    """
    names = [path.name for path in directory.glob("*") if path.is_file()]
    weight_format = _find_format(names)
    if weight_format is None or not any(map(_TOKENIZER.fullmatch, names)) or set(CONFIG_FILES).isdisjoint(names):
        return False
    if indexes := _indexes(names, weight_format):
        return any(_has_indexed_shards(directory, index) for index in indexes)
    weights = _weights(names, weight_format)
    return all(_has_all_shards(name, weights) for name in weights)


def _find_format(paths: list[str]) -> re.Pattern[str] | None:
    weights = list(filter(is_weights, paths))
    return next((pattern for pattern in _WEIGHT_FORMATS if any(map(pattern.fullmatch, weights))), None)


def _weights(paths: list[str], weight_format: re.Pattern[str]) -> list[str]:
    """Return the weights in this format; those of sentence-transformers' modules have the same suffix."""
    weights = list(filter(is_weights, paths))
    files = list(filter(weight_format.fullmatch, weights))
    in_shards = {shard["stem"] + shard["suffix"] for shard in map(_SHARD.fullmatch, files) if shard}
    suffix = PurePosixPath(files[0]).suffix
    modules = [path for path in weights if path.endswith(suffix) and _MODULE.fullmatch(path)]
    return [*(path for path in files if path not in in_shards), *modules]


def _indexes(paths: list[str], weight_format: re.Pattern[str]) -> list[str]:
    return [path for path in paths if (index := _INDEX.fullmatch(path)) and weight_format.fullmatch(index["weights"])]


def _is_text(path: str) -> bool:
    """Return whether this is the tokenizer or a file of text, such as the configuration, but no index of weights."""
    is_text = PurePosixPath(path).suffix in _TEXT_SUFFIXES or any(
        pattern.fullmatch(path) for pattern in (_TOKENIZER, _LICENSES)
    )
    return is_text and _INDEX.fullmatch(path) is None


def _has_indexed_shards(directory: Path, index: str) -> bool:
    try:
        shards = set(read_index(directory / index).values())
    except (OSError, ValueError):
        return False
    return all((directory / shard).is_file() for shard in shards)


def _has_all_shards(name: str, names: list[str]) -> bool:
    """Return whether all shards of a set are there, given one; True for a file that is no shard."""
    if (shard := _SHARD.fullmatch(name)) is None:
        return True
    stem, count, suffix, width = shard["stem"], shard["count"], shard["suffix"], len(shard["number"])
    return all(f"{stem}-{number:0{width}}-of-{count}{suffix}" in names for number in range(1, int(count) + 1))


def cache_root(environment: Mapping[str, str] = os.environ) -> Path:
    """Return this project's cache directory; an empty variable counts as unset, as in the XDG specification."""
    if own := environment.get("VLLM_SERVERLESS_CACHE"):
        return Path(own)
    if shared := environment.get("XDG_CACHE_HOME"):
        return Path(shared) / "vllm-serverless"
    return Path.home() / ".cache" / "vllm-serverless"


def compiled_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of compiled code where `COMPILE_CACHE_DIR` is not set."""
    return cache_root(environment) / "compiled"


def is_compiled_code(name: str) -> bool:
    """Return whether a file may be packed; its name is relative to the directory that one worker compiles into."""
    return not name.endswith(PARTIAL) and not name.startswith(_DOWNLOADS)
