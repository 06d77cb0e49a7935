"""A start that fails says why, in one line that a person can act on."""

from __future__ import annotations

import errno
from pathlib import Path

import httpx2
import pytest

from engine.backend import startup_errors
from engine.config.vllm_flags import Flags, FlagValue

# Messages as vLLM 0.32, the hub's client and torch word them.
CAUSES = {
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


@pytest.mark.parametrize("message", CAUSES)
def test_a_cause_that_is_known_is_told_with_what_to_do(message: str) -> None:
    told = startup_errors.explain(RuntimeError(message), "", "org/model")

    assert CAUSES[message] in told
    assert "\n" not in told


@pytest.mark.parametrize("message", CAUSES)
def test_what_the_engines_process_noted_comes_before_what_the_worker_was_told(message: str) -> None:
    noted = f"EngineCore failed to start.\nTraceback (most recent call last):\nValueError: {message}\n"

    told = startup_errors.explain(RuntimeError("Engine core initialization failed. See above."), noted, "org/model")

    assert CAUSES[message] in told


NOT_FOUND = """Repository Not Found for url: https://hub.example/org/none/resolve/main/tokenizer_config.json.
Please make sure you specified the correct `repo_id`. If you are trying to access a private or gated repo, log in."""


def hub_error(kind: str, message: str) -> Exception:
    from huggingface_hub import errors

    request = httpx2.Request("GET", "https://hub.example/")
    error: Exception = getattr(errors, kind)(message, response=httpx2.Response(404, request=request))
    return error


@pytest.mark.parametrize(
    ("kind", "said"),
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
@pytest.mark.parametrize("noted", [True, False])
def test_what_the_hub_refuses_is_known_by_its_class_and_is_about_the_repository_that_was_asked_for(
    kind: str, said: str, noted: bool
) -> None:
    """Of whatever class, the hub's client speaks of "a private or gated repo"."""
    flags = object.__new__(Flags)
    flags.values = {"tokenizer": FlagValue("TOKENIZER_NAME", "environment", "", (), "org/none")}
    outer = OSError("org/none is not a local folder and is not a valid model identifier listed on the hub")
    outer.__cause__ = hub_error(kind, NOT_FOUND)
    text = f"Traceback (most recent call last):\nhuggingface_hub.errors.{kind}: 404\n{NOT_FOUND}\n" if noted else ""

    assert startup_errors.explain(RuntimeError("see above") if noted else outer, text, "/a/model", flags) == said


@pytest.mark.parametrize("name", ["TOKENIZER", "TOKENIZER_NAME", "--tokenizer"])
def test_a_revision_of_the_tokenizer_is_named_however_the_tokenizer_was_given(name: str) -> None:
    flags = object.__new__(Flags)
    flags.values = {"tokenizer": FlagValue(name, "environment", "", (), "org/none")}

    said = startup_errors.explain(hub_error("RevisionNotFoundError", NOT_FOUND), "", "/a/model", flags)

    assert said == "org/none has no such revision: check TOKENIZER_REVISION"


def test_where_the_hub_cannot_be_reached_what_was_asked_for_is_what_a_flag_names(tmp_path: Path) -> None:
    flags = object.__new__(Flags)
    flags.values = {"tokenizer": FlagValue("TOKENIZER_NAME", "environment", "", (), "org/none")}

    said = startup_errors.explain(
        OSError("We couldn't connect to 'the hub' to load the files"), "", str(tmp_path), flags
    )

    assert said == "the hub cannot be reached, and org/none is not on this machine (see TOKENIZER_NAME)"


def test_code_that_a_models_configuration_names_is_not_the_model(tmp_path: Path) -> None:
    error = hub_error(
        "RepositoryNotFoundError", "Not found for url: http://hub/org/code/resolve/main/configuration.py."
    )

    said = startup_errors.explain(error, "", str(tmp_path))

    assert said.startswith("there is no model org/code: check the model's config.json, which names it")


def test_a_cause_that_is_not_known_is_told_in_the_words_of_the_first_error() -> None:
    noted = "failed\nTraceback:\n  x()\nKeyError: 'lm_head'\nException: WorkerProc initialization failed\n"

    assert startup_errors.explain(RuntimeError("see above"), noted, "org/model") == "KeyError: 'lm_head'"


def test_what_pydantic_adds_is_left_out() -> None:
    error = ValueError(
        "1 validation error for ModelConfig\n  Value error, Unknown method: x [type=value_error, a=b]\n  .."
    )

    assert startup_errors.explain(error, "", "org/model") == "Unknown method: x"


def test_a_full_disk_is_known_by_its_number() -> None:
    wrapped = RuntimeError("download failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "voll")

    assert "the disk is full" in startup_errors.explain(wrapped, "", "org/model")
