"""A failed start is explained in one line that says what to do."""

from __future__ import annotations

import errno
from pathlib import Path

import httpx2
import pytest

from engine.backend import startup_errors
from engine.config.vllm_flags import Flags, FlagValue

# Messages of vLLM 0.32, the hub's client and torch, and what their explanations contain.
EXPLANATIONS = {
    "Based on the available memory, the estimated maximum model length is 384. Try": "set it to 384 or less",
    "No available memory for the cache blocks.": "a smaller MAX_MODEL_LEN or a larger GPU_MEMORY_UTILIZATION",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB": "not enough memory",
    "allocation is less than requested memory for kv (900.0 GiB)": "not enough memory",
    "User-specified max_model_len (9) is greater than the derived max_model_len (max_position_embeddings=8 or": (
        "MAX_MODEL_LEN is 9, but the model's maximum length is 8"
    ),
    "You are trying to access a gated repo.": "org/model is gated: ask for access on its page, and set HF_TOKEN",
    "RevisionNotFoundError: 404": "no such revision: check MODEL_REVISION",
    "org/model is not a local folder and is not a valid model identifier": "there is no model org/model",
    "We couldn't connect to 'the hub' to load the files": "the hub cannot be reached, and org/model is not on this",
    "AttributeError: '_OpNamespace' '_C' object has no attribute 'x'": "is missing (on a CPU: libnuma1)",
    "OSError: [Errno 28] No space left on device": "the disk is full",
    "org/model does not appear to have a file named config.json": "org/model is incomplete",
}


@pytest.mark.parametrize("message", EXPLANATIONS)
def test_a_known_cause_is_explained(message: str) -> None:
    explanation = startup_errors.explain(RuntimeError(message), "", "org/model")

    assert EXPLANATIONS[message] in explanation
    assert "\n" not in explanation


@pytest.mark.parametrize("message", EXPLANATIONS)
def test_the_log_of_the_engines_process_takes_precedence_over_the_workers_exception(message: str) -> None:
    log = f"EngineCore failed to start.\nTraceback (most recent call last):\nValueError: {message}\n"

    explanation = startup_errors.explain(
        RuntimeError("Engine core initialization failed. See above."), log, "org/model"
    )

    assert EXPLANATIONS[message] in explanation


NOT_FOUND = """Repository Not Found for url: https://hub.example/org/none/resolve/main/tokenizer_config.json.
Please make sure you specified the correct `repo_id`. If you are trying to access a private or gated repo, log in."""


def hub_error(kind: str, message: str) -> Exception:
    from huggingface_hub import errors

    request = httpx2.Request("GET", "https://hub.example/")
    error: Exception = getattr(errors, kind)(message, response=httpx2.Response(404, request=request))
    return error


@pytest.mark.parametrize(
    ("kind", "expected_message"),
    [
        (
            "RepositoryNotFoundError",
            "there is no model org/none: check TOKENIZER_NAME; a private model needs HF_TOKEN too",
        ),
        (
            "GatedRepoError",
            "org/none is gated: ask for access on its page, and set HF_TOKEN to a token of that account",
        ),
        ("RevisionNotFoundError", "org/none has no such revision: check TOKENIZER_REVISION"),
    ],
)
@pytest.mark.parametrize("logged", [True, False])
def test_an_error_of_the_hub_is_recognized_by_its_class_and_names_the_requested_repository(
    kind: str, expected_message: str, logged: bool
) -> None:
    """The message of each class mentions "a private or gated repo"."""
    flags = object.__new__(Flags)
    flags.values = {"tokenizer": FlagValue("TOKENIZER_NAME", "environment", "", (), "org/none")}
    outer = OSError("org/none is not a local folder and is not a valid model identifier listed on the hub")
    outer.__cause__ = hub_error(kind, NOT_FOUND)
    text = f"Traceback (most recent call last):\nhuggingface_hub.errors.{kind}: 404\n{NOT_FOUND}\n" if logged else ""

    error = RuntimeError("see above") if logged else outer
    assert startup_errors.explain(error, text, "/a/model", flags) == expected_message


@pytest.mark.parametrize("name", ["TOKENIZER", "TOKENIZER_NAME", "--tokenizer"])
def test_the_tokenizers_revision_is_named_whichever_variable_set_the_tokenizer(name: str) -> None:
    flags = object.__new__(Flags)
    flags.values = {"tokenizer": FlagValue(name, "environment", "", (), "org/none")}

    explanation = startup_errors.explain(hub_error("RevisionNotFoundError", NOT_FOUND), "", "/a/model", flags)

    assert explanation == "org/none has no such revision: check TOKENIZER_REVISION"


def test_an_unreachable_hub_is_reported_with_the_repository_that_a_flag_names(tmp_path: Path) -> None:
    flags = object.__new__(Flags)
    flags.values = {"tokenizer": FlagValue("TOKENIZER_NAME", "environment", "", (), "org/none")}

    explanation = startup_errors.explain(
        OSError("We couldn't connect to 'the hub' to load the files"), "", str(tmp_path), flags
    )

    assert explanation == "the hub cannot be reached, and org/none is not on this machine (see TOKENIZER_NAME)"


def test_a_missing_repository_of_code_is_reported_as_named_by_the_models_config(tmp_path: Path) -> None:
    error = hub_error(
        "RepositoryNotFoundError", "Not found for url: http://hub/org/code/resolve/main/configuration.py."
    )

    explanation = startup_errors.explain(error, "", str(tmp_path))

    assert explanation.startswith("there is no model org/code: check the model's config.json, which names it")


def test_an_unknown_cause_is_the_text_of_the_first_error() -> None:
    log = "failed\nTraceback:\n  x()\nKeyError: 'lm_head'\nException: WorkerProc initialization failed\n"

    assert startup_errors.explain(RuntimeError("see above"), log, "org/model") == "KeyError: 'lm_head'"


def test_pydantics_additions_are_removed() -> None:
    error = ValueError(
        "1 validation error for ModelConfig\n  Value error, Unknown method: x [type=value_error, a=b]\n  .."
    )

    assert startup_errors.explain(error, "", "org/model") == "Unknown method: x"


def test_a_full_disk_is_recognized_by_errno() -> None:
    wrapped = RuntimeError("download failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "voll")

    assert "the disk is full" in startup_errors.explain(wrapped, "", "org/model")
