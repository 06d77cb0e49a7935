"""Which files of a repository serving needs: one set of weights, the configuration, the tokenizer, the license."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

# Weights in the order in which they are preferred; a repository often holds the same ones several times.
_WEIGHTS = (
    re.compile(r"(?!consolidated)[^/]+\.safetensors"),
    re.compile(r"consolidated[^/]*\.safetensors"),
    re.compile(r"(?:pytorch_)?model[^/]*\.bin"),
    re.compile(r"[^/]+\.pth?"),
)
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}
# What a training run leaves beside its weights, and adapters, which are no model of their own.
_NO_WEIGHTS = re.compile(r"(?:training_args|optimizer|scheduler|rng_state|scaler|adapter_model).*")
_SHARD = re.compile(r"(?P<stem>.+)-\d+-of-\d+")
# The layers that sentence-transformers puts behind a model: `2_Dense/model.safetensors`.
_LAYER = re.compile(r"\d+_\w+")
# The same model in another form, and what people show on its page.
_OTHER_FORMS = re.compile(
    r"original|onnx|openvino|metal|coreml|gguf|tflite|runs|logs|assets|images|figures|checkpoint-\d+|\..+"
)
_TEXT_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".vocab", ".yaml", ".yml"}
_LICENSES = re.compile(r"(?:LICEN[SC]E|NOTICE|USE_POLICY|COPYING)[^/]*", re.IGNORECASE)
_INDEX = re.compile(r"(?P<whole>.+\.(?:safetensors|bin))\.index\.json")


def required_files(paths: Iterable[str]) -> list[str]:
    """The paths that serving needs, sorted; without weights among them if there are none that vLLM loads."""
    own = [path for path in paths if "/" not in path or not _OTHER_FORMS.fullmatch(path.split("/")[0])]
    weights = _weights(own)
    wholes = {_whole(path) for path in weights}
    return sorted({*weights, *(path for path in own if _is_beside(path, wholes))})


def is_weights(path: str) -> bool:
    """Whether the file holds weights."""
    return PurePosixPath(path).suffix in _WEIGHT_SUFFIXES


def _weights(paths: list[str]) -> list[str]:
    candidates = [path for path in paths if is_weights(path) and not _NO_WEIGHTS.fullmatch(PurePosixPath(path).name)]
    for form in _WEIGHTS:
        if main := [path for path in candidates if form.fullmatch(path)]:
            sharded = {_whole(path) for path in main if _whole(path) != path}
            main = [path for path in main if path not in sharded]
            suffix = PurePosixPath(main[0]).suffix
            layers = [path for path in candidates if path.endswith(suffix) and _is_of_a_layer(path)]
            return [*main, *layers]
    return []


def _is_of_a_layer(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return len(parts) > 1 and _LAYER.fullmatch(parts[0]) is not None


def _whole(path: str) -> str:
    """What the file of a shard would be called if it were not split; the path itself if it is no shard."""
    pure = PurePosixPath(path)
    shard = _SHARD.fullmatch(pure.stem)
    return str(pure.with_name(shard["stem"] + pure.suffix)) if shard else path


def _is_beside(path: str, wholes: set[str]) -> bool:
    """Whether it is a file that belongs to these weights, which are named as if they were not split, or to none."""
    if index := _INDEX.fullmatch(path):
        return index["whole"] in wholes
    return PurePosixPath(path).suffix in _TEXT_SUFFIXES or _LICENSES.fullmatch(path) is not None
