"""Turns the errors of a failed start into one line that says what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.backend import compat

if TYPE_CHECKING:
    from engine.config.vllm_flags import Flags

_MAX_LENGTH = 300

# Errors of the hub's client, by class name: their messages quote others, and so cannot be searched.
_HUB_ERRORS = {
    "GatedRepoError": "{repository} is gated: ask for access on its page, and set HF_TOKEN to a token of that account",
    "RevisionNotFoundError": "{repository} has no such revision: check {revision}",
    "RepositoryNotFoundError": "there is no model {repository}: check {name}; a private model needs HF_TOKEN too",
    "HFValidationError": "{repository} is not a model name: check {name}; the format is organization/name",
    "LocalEntryNotFoundError": "the hub cannot be reached, and {repository} is not on this machine (see {name})",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and {repository} is not on this machine (see {name})",
}
# Patterns of messages of vLLM, transformers and torch. The first that matches is used.
_MESSAGES: tuple[tuple[str, str], ...] = (
    (compat.MODEL_LEN_EXCEEDS_MEMORY, "not enough memory for MAX_MODEL_LEN: set it to {0} or less"),
    (
        compat.NO_KV_CACHE_MEMORY,
        "not enough memory for the KV cache: set a smaller MAX_MODEL_LEN or a larger GPU_MEMORY_UTILIZATION",
    ),
    (
        compat.NOT_ENOUGH_MEMORY,
        "not enough memory: set another GPU_MEMORY_UTILIZATION, a smaller MAX_MODEL_LEN, or use a larger GPU",
    ),
    (
        compat.MODEL_LEN_EXCEEDS_MODEL,
        "MAX_MODEL_LEN is {0}, but the model's maximum length is {1}",
    ),
    (r"Invalid rev id", _HUB_ERRORS["RevisionNotFoundError"]),
    (r"(?:does not appear to have a file named|is no file named) ([\w./-]+\w)", "{repository} is incomplete: no {0}"),
    (
        r"(?:Can't load the configuration|Invalid repository ID or local directory specified: '/)",
        "{repository} is incomplete, or is not a model",
    ),
    (
        r"(?:is not a valid model identifier|Repo id must|Invalid repository ID)",
        _HUB_ERRORS["RepositoryNotFoundError"],
    ),
    (r"access a gated repo", _HUB_ERRORS["GatedRepoError"]),
    (r"(?:couldn't connect to|offline mode)", _HUB_ERRORS["LocalEntryNotFoundError"]),
    (
        r"'_OpNamespace' '_C' object has no attribute",
        "vLLM's kernels cannot be loaded: a library is missing (on a CPU: libnuma1) or the driver is too old",
    ),
    (r"No space left on device", "the disk is full: use a larger disk or a network volume"),
)
# How messages name the repository of the hub, or the directory, that they are about.
_REPOSITORY = (
    re.compile(
        r"for url: \w+://[^/\s]+/(?:api/models/)?(?P<name>[\w.-]+/[\w.-]+?)(?:/(?:resolve|revision|tree)/|[\s?]|\.?$)"
    ),
    re.compile(r"(?P<name>[\w./-]+) is not a local folder"),
    re.compile(r"(?:directory specified|load the configuration of|load tokenizer for|repo id)\W*'(?P<name>[^']+)'"),
    re.compile(r"(?P<name>[\w./-]+) does not appear to have"),
)


def explain(error: BaseException, engine_errors: str, model: str, flags: Flags | None = None) -> str:
    """Return why the worker does not start.

    Args:
        error: raised in this process.
        engine_errors: error records in the log of the engine's processes, with tracebacks.
        model: the model's name or path.
        flags: vLLM's, as they are set: one of them may name what is missing.
    """
    return known(error, model, flags, engine_errors) or _first_error(next(_texts(error, engine_errors)))


def known(error: BaseException, model: str, flags: Flags | None = None, engine_errors: str = "") -> str | None:
    """Return why the worker does not start and what to do, if the cause is known; the arguments are `explain`'s."""
    texts = list(_texts(error, engine_errors))
    for class_name, template in _HUB_ERRORS.items():
        if any(re.search(rf"\b{class_name}\b", text) for text in texts):
            return _fill(template, texts, model, flags)
    for pattern, template in _MESSAGES:
        for text in texts:
            if found := re.search(pattern, text):
                return _fill(template, texts, model, flags, *found.groups())
    return None


def _texts(error: BaseException, engine_errors: str) -> Iterator[str]:
    """Yield the texts to search: the log of the engine's processes, the error, and its causes."""
    if engine_errors:
        yield engine_errors
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            yield "No space left on device"
        yield f"{type(cause).__name__}: {cause}"
        cause = cause.__cause__ or cause.__context__


def _fill(template: str, texts: list[str], model: str, flags: Flags | None, *groups: str) -> str:
    """Return the message, with the repository that the error is about and the setting that names it."""
    found = (match["name"] for text in texts for pattern in _REPOSITORY if (match := pattern.search(text)))
    values = {} if flags is None else flags.values
    # An offline client does not say which repository it needs: it is one of a flag that is not on this machine.
    missing = (
        flag.value
        for dest, flag in values.items()
        if dest in ("tokenizer", "hf_config_path") and not Path(str(flag.value)).exists()
    )
    repository = str(next(found, None) or next(missing, model))
    exact = [(dest, flag.name) for dest, flag in values.items() if repository == str(flag.value)]
    partial = [(dest, flag.name) for dest, flag in values.items() if repository in str(flag.value)]
    dest, name = next(iter([*exact, *partial]), ("", None))
    if name is None and repository != model and Path(model).is_dir() and not repository.startswith("/"):
        name = "the model's config.json, which names it"
    if repository.startswith("/") and template in _HUB_ERRORS.values():
        template = "there is no directory {repository}: check {name}"
    revision = "TOKENIZER_REVISION" if dest == "tokenizer" else "MODEL_REVISION"
    return template.format(*groups, repository=repository, name=name or "MODEL_NAME", revision=revision)


def _first_error(text: str) -> str:
    """Return the message of the first exception in a text, shortened and without what pydantic adds."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("Value error, ")]
    errors = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception): ", line)]
    first = next(iter([*reasons, *errors, *lines[-1:]]), "no reason given")
    return re.sub(r" \[type=.*", "", first.removeprefix("Value error, "))[:_MAX_LENGTH]
