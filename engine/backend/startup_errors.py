"""Why the worker does not start, in one line that a person can act on."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config.vllm_flags import Flags

_LENGTH = 300

# What the hub's client raises, by the name of the class: a message quotes other messages, and would mislead.
_OF_THE_HUB = {
    "GatedRepoError": "{repository} is gated: ask for access on its page, and set HF_TOKEN to a token of that account",
    "RevisionNotFoundError": "{repository} has no such revision: check {revision}",
    "RepositoryNotFoundError": "there is no model {repository}: check {name}; a private model needs HF_TOKEN too",
    "HFValidationError": "{repository} is no name of a model: check {name}; it looks like organization/name",
    "LocalEntryNotFoundError": "the hub cannot be reached, and {repository} is not on this machine (see {name})",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and {repository} is not on this machine (see {name})",
}
# What a message of vLLM, transformers or torch stands for: the first that matches is told.
_CAUSES: tuple[tuple[str, str], ...] = (
    (r"estimated maximum model length is (\d+)", "there is not enough memory for MAX_MODEL_LEN: set it to {0} or less"),
    (
        r"(?:To serve at least one request|No available memory for the cache)",
        "there is not enough memory for the KV cache: set a smaller MAX_MODEL_LEN or a larger GPU_MEMORY_UTILIZATION",
    ),
    (
        r"(?:OutOfMemoryError|out of memory|less than (?:desired|requested)[^.]*memory)",
        "there is not enough memory: set another GPU_MEMORY_UTILIZATION, a smaller MAX_MODEL_LEN, or take a larger GPU",
    ),
    (
        r"max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)",
        "MAX_MODEL_LEN is {0}, and the model's greatest length is {1}",
    ),
    (r"Invalid rev id", _OF_THE_HUB["RevisionNotFoundError"]),
    (r"(?:does not appear to have a file named|is no file named) ([\w./-]+\w)", "{repository} is not whole: no {0}"),
    (
        r"(?:Can't load the configuration|Invalid repository ID or local directory specified: '/)",
        "{repository} is not whole, or no model at all",
    ),
    (
        r"(?:is not a valid model identifier|Repo id must|Invalid repository ID)",
        _OF_THE_HUB["RepositoryNotFoundError"],
    ),
    (r"access a gated repo", _OF_THE_HUB["GatedRepoError"]),
    (r"(?:couldn't connect to|offline mode)", _OF_THE_HUB["LocalEntryNotFoundError"]),
    (
        r"'_OpNamespace' '_C' object has no attribute",
        "vLLM's kernels cannot be loaded: a library is missing (on a CPU: libnuma1) or the driver is too old",
    ),
    (r"No space left on device", "the disk is full: use a larger disk or a network volume"),
)
# How messages name what they are about: a repository of the hub, or a directory.
_NAMED = (
    re.compile(
        r"for url: \w+://[^/\s]+/(?:api/models/)?(?P<name>[\w.-]+/[\w.-]+?)(?:/(?:resolve|revision|tree)/|[\s?]|\.?$)"
    ),
    re.compile(r"(?P<name>[\w./-]+) is not a local folder"),
    re.compile(r"(?:directory specified|load the configuration of|load tokenizer for|repo id)\W*'(?P<name>[^']+)'"),
    re.compile(r"(?P<name>[\w./-]+) does not appear to have"),
)


def explain(error: BaseException, noted: str, model: str, flags: Flags | None = None) -> str:
    """Why the worker does not start.

    Args:
        error: what was raised here.
        noted: the errors that the engine's processes noted.
        model: the model's name or path.
        flags: vLLM's, as they are given: one of them may name what is missing.
    """
    return known(error, model, flags, noted) or _first_error(next(_texts(error, noted)))


def known(error: BaseException, model: str, flags: Flags | None = None, noted: str = "") -> str | None:
    """What to do about it, if the cause is one that is known."""
    texts = list(_texts(error, noted))
    for kind, told in _OF_THE_HUB.items():
        if any(re.search(rf"\b{kind}\b", text) for text in texts):
            return _in_words(told, texts, model, flags)
    for pattern, told in _CAUSES:
        for text in texts:
            if found := re.search(pattern, text):
                return _in_words(told, texts, model, flags, *found.groups())
    return None


def _texts(error: BaseException, noted: str) -> Iterator[str]:
    """All that was said: in the engine's processes, by the error, and by what that came from."""
    if noted:
        yield noted
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            yield "No space left on device"
        yield f"{type(cause).__name__}: {cause}"
        cause = cause.__cause__ or cause.__context__


def _in_words(told: str, texts: list[str], model: str, flags: Flags | None, *groups: str) -> str:
    found = (match["name"] for text in texts for pattern in _NAMED if (match := pattern.search(text)))
    given = {} if flags is None else flags.given
    # An offline client does not say what it was asked for: it is what a flag names that is not here.
    elsewhere = (
        one.value
        for dest, one in given.items()
        if dest in ("tokenizer", "hf_config_path") and not Path(str(one.value)).exists()
    )
    repository = str(next(found, None) or next(elsewhere, model))
    dest, name = next(((dest, one.name) for dest, one in given.items() if repository in str(one.value)), ("", None))
    if name is None and repository != model and Path(model).is_dir() and not repository.startswith("/"):
        name = "the model's config.json, which names it"
    if repository.startswith("/") and told in _OF_THE_HUB.values():
        told = "there is no directory {repository}: check {name}"
    revision = "TOKENIZER_REVISION" if dest == "tokenizer" else "MODEL_REVISION"
    return told.format(*groups, repository=repository, name=name or "MODEL_NAME", revision=revision)


def _first_error(text: str) -> str:
    """The first exception's message in a text, shortened: what follows from it, and what pydantic adds, is left out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("Value error, ")]
    errors = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception): ", line)]
    told = next(iter([*reasons, *errors, *lines[-1:]]), "no reason given")
    return re.sub(r" \[type=.*", "", told.removeprefix("Value error, "))[:_LENGTH]
