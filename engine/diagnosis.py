"""Why the engine does not start, in one line that a person can act on."""

from __future__ import annotations

import errno
import re

_LENGTH = 300

# What a message of vLLM, the hub's client or torch stands for: the first that matches is told.
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
    (
        r"(?:GatedRepoError|gated repo)",
        "{model} is gated: ask for access on its page, and set HF_TOKEN to a token of that account",
    ),
    (r"(?:RevisionNotFoundError|Invalid rev id)", "{model} has no such revision: check MODEL_REVISION"),
    (
        r"(?:RepositoryNotFoundError|is not a valid model identifier|Repo id must)",
        "there is no model {model}: check MODEL_NAME; a private model needs HF_TOKEN too",
    ),
    (
        r"(?:couldn't connect to|LocalEntryNotFoundError|offline mode)",
        "the hub cannot be reached, and {model} is not on this machine",
    ),
    (
        r"'_OpNamespace' '_C' object has no attribute",
        "vLLM's kernels cannot be loaded: a library is missing (on a CPU: libnuma1) or the driver is too old",
    ),
    (r"No space left on device", "the disk is full: use a larger disk or a network volume"),
    (
        r"(?:does not appear to have a file named|Can't load the configuration)",
        "{model} is not whole, or no model at all",
    ),
)


def explain(error: BaseException, noted: str, model: str) -> str:
    """Why the engine does not start.

    Args:
        error: what it was told here.
        noted: the errors that its processes noted.
        model: the model's name or path.
    """
    texts = [noted] if noted else []
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            texts.append("No space left on device")
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    for pattern, told in _CAUSES:
        for text in texts:
            if found := re.search(pattern, text):
                return told.format(*found.groups(), model=model)
    return _first_error(texts[0])


def _first_error(text: str) -> str:
    """The first exception's message in a text, shortened: what follows from it, and what pydantic adds, is left out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("Value error, ")]
    errors = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception): ", line)]
    told = next(iter([*reasons, *errors, *lines[-1:]]), "no reason given")
    return re.sub(r" \[type=.*", "", told.removeprefix("Value error, "))[:_LENGTH]
