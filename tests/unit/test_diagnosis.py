"""A start that fails says why, in one line that a person can act on."""

from __future__ import annotations

import errno

import pytest

from engine import diagnosis

# Messages as vLLM 0.32, the hub's client and torch word them.
CAUSES = {
    "Based on the available memory, the estimated maximum model length is 384. Try": "set it to 384 or less",
    "No available memory for the cache blocks.": "a smaller MAX_MODEL_LEN or a larger GPU_MEMORY_UTILIZATION",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB": "not enough memory",
    "allocation is less than requested memory for kv (900.0 GiB)": "not enough memory",
    "User-specified max_model_len (9) is greater than the derived max_model_len (max_position_embeddings=8 or": (
        "MAX_MODEL_LEN is 9, and the model's greatest length is 8"
    ),
    "You are trying to access a gated repo.": "org/model is gated: ask for access on its page, and set HF_TOKEN",
    "RevisionNotFoundError: 404": "no such revision: check MODEL_REVISION",
    "org/model is not a local folder and is not a valid model identifier": "there is no model org/model",
    "We couldn't connect to 'the hub' to load the files": "the hub cannot be reached, and org/model is not on this",
    "AttributeError: '_OpNamespace' '_C' object has no attribute 'x'": "is missing (on a CPU: libnuma1)",
    "OSError: [Errno 28] No space left on device": "the disk is full",
    "org/model does not appear to have a file named config.json": "org/model is not whole",
}


@pytest.mark.parametrize("message", CAUSES)
def test_a_cause_that_is_known_is_told_with_what_to_do(message: str) -> None:
    told = diagnosis.explain(RuntimeError(message), "", "org/model")

    assert CAUSES[message] in told
    assert "\n" not in told


@pytest.mark.parametrize("message", CAUSES)
def test_what_the_engines_process_noted_comes_before_what_the_worker_was_told(message: str) -> None:
    noted = f"EngineCore failed to start.\nTraceback (most recent call last):\nValueError: {message}\n"

    told = diagnosis.explain(RuntimeError("Engine core initialization failed. See above."), noted, "org/model")

    assert CAUSES[message] in told


def test_a_cause_that_is_not_known_is_told_in_the_words_of_the_first_error() -> None:
    noted = "failed\nTraceback:\n  x()\nKeyError: 'lm_head'\nException: WorkerProc initialization failed\n"

    assert diagnosis.explain(RuntimeError("see above"), noted, "org/model") == "KeyError: 'lm_head'"


def test_what_pydantic_adds_is_left_out() -> None:
    error = ValueError(
        "1 validation error for ModelConfig\n  Value error, Unknown method: x [type=value_error, a=b]\n  .."
    )

    assert diagnosis.explain(error, "", "org/model") == "Unknown method: x"


def test_a_full_disk_is_known_by_its_number() -> None:
    wrapped = RuntimeError("download failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "voll")

    assert "the disk is full" in diagnosis.explain(wrapped, "", "org/model")
