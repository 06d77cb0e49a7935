"""The variables that configure the worker: the environment's, which override those of the image's settings file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigurationError

BAKED_SETTINGS_FILE = Path("/workspace/vllm/settings.json")
ENVIRONMENT = "environment"
# How people and templates write a value that is not set: Python's and JSON's words for it.
NULL_WORDS = {"None", "none", "null"}
TOKEN, OLD_TOKEN = "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"
# The worker's own settings that had another name.
FORMER_NAMES = {"JOB_TIMEOUT_S": "DELIVERY_TIMEOUT_S"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Variable:
    """A value as it was written, and where."""

    value: str
    source: str


def read(environment: Mapping[str, str] = os.environ) -> dict[str, Variable]:
    """Return all variables by their upper-case names; an empty one counts as not set.

    `BAKED_SETTINGS_FILE` is a JSON object of variables and values: `{"MAX_MODEL_LEN": 8192}`. If it has `MODEL_NAME`,
    and the environment names another model, the file is ignored: its values are for its own model. (If a config file or
    extra arguments name another model, only vLLM's flags are ignored: `engine.config.vllm_flags`.)

    Raises:
        ConfigurationError: the image's file cannot be read.
    """
    path = environment.get("BAKED_SETTINGS_FILE", "").strip()
    file = BAKED_SETTINGS_FILE if path in NULL_WORDS | {""} else Path(path)
    baked = _without_empty({name.upper(): Variable(as_text(value), str(file)) for name, value in _load(file).items()})
    own = _without_empty({name.upper(): Variable(value.strip(), ENVIRONMENT) for name, value in environment.items()})
    for variables in (baked, own):
        _rename(variables)
        if not _is_set(variables, TOKEN) and _is_set(variables, OLD_TOKEN):  # The hub's client accepts both names too.
            old = variables[OLD_TOKEN]
            variables[TOKEN] = Variable(old.value, f"{old.source}, {OLD_TOKEN}")
    if "MODEL_NAME" in baked and _model_name(own) not in (None, baked["MODEL_NAME"].value.lower()):
        _log.info("Ignoring %s: its settings are for %s", file, baked["MODEL_NAME"].value)
        baked = {}
    return {**baked, **own}


def export_token(variables: Mapping[str, Variable]) -> None:
    """Set `HF_TOKEN` of this process for the hub's client, or remove it: the client would use `None` as a token."""
    for name in (TOKEN, OLD_TOKEN):
        os.environ.pop(name, None)
    if (token := variables.get(TOKEN)) is not None and token.value not in NULL_WORDS:
        os.environ[TOKEN] = token.value


def as_text(value: Any) -> str:
    """Return a value of JSON or YAML as it would be written in a variable; an empty text for null."""
    if value is None:
        return ""
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, default=str)
    return str(value).strip()  # YAML has dates as well: a revision may look like one.


def _model_name(variables: Mapping[str, Variable]) -> str | None:
    name = variables.get("MODEL_NAME") or variables.get("MODEL")
    return None if name is None or name.value in NULL_WORDS else name.value.lower()


def _rename(variables: dict[str, Variable]) -> None:
    """Move variables with a former name to the present one; if both are set, the present one wins."""
    for former, name in FORMER_NAMES.items():
        if (variable := variables.pop(former, None)) is not None:
            _log.warning("%s is deprecated (%s): use %s", former, variable.source, name)
            if not _is_set(variables, name):
                variables[name] = variable


def _is_set(variables: Mapping[str, Variable], name: str) -> bool:
    return name in variables and variables[name].value not in NULL_WORDS


def _without_empty(variables: dict[str, Variable]) -> dict[str, Variable]:
    return {name: variable for name, variable in variables.items() if variable.value}


def _load(file: Path) -> dict[str, Any]:
    # Not `Path.is_file`, which raises if this user may not look into the directory.
    if file == BAKED_SETTINGS_FILE and not os.path.isfile(file):  # noqa: PTH113
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"BAKED_SETTINGS_FILE={str(file)!r} cannot be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f'{file} is not a JSON object of variables, as in {{"MAX_MODEL_LEN": 8192}}')
    return document
