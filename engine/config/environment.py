"""The variables that settings are given by: the environment's, over those that the image was built with."""

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
# Python's and JSON's words for a value that is not there, as people and templates write them.
NOT_GIVEN = {"None", "none", "null"}
TOKEN, OLD_TOKEN = "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"
# Settings of this worker that had another name.
FORMER_NAMES = {"JOB_TIMEOUT_S": "DELIVERY_TIMEOUT_S"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Variable:
    """A value as it was written, and where."""

    value: str
    source: str


def read(environment: Mapping[str, str] = os.environ) -> dict[str, Variable]:
    """All variables by their name in capitals; an empty one counts as not set.

    `BAKED_SETTINGS_FILE` is a JSON object of variables and values: `{"MAX_MODEL_LEN": 8192}`. What it says of one model
    is not for another: where it has `MODEL_NAME`, and the environment names another model, all of it is left out
    (where a config file or extra arguments do, vLLM's flags are: `engine.config.vllm_flags`).

    Raises:
        ConfigurationError: the image's file cannot be read.
    """
    named = environment.get("BAKED_SETTINGS_FILE", "").strip()
    file = BAKED_SETTINGS_FILE if named in NOT_GIVEN | {""} else Path(named)
    baked = _set({name.upper(): Variable(as_text(value), str(file)) for name, value in _baked(file).items()})
    given = _set({name.upper(): Variable(value.strip(), ENVIRONMENT) for name, value in environment.items()})
    for variables in (baked, given):
        _rename(variables)
    if TOKEN not in given and OLD_TOKEN in given:  # As the hub's client does.
        given[TOKEN] = Variable(given[OLD_TOKEN].value, f"{ENVIRONMENT}, {OLD_TOKEN}")
    if "MODEL_NAME" in baked and _model(given) not in (None, baked["MODEL_NAME"].value.lower()):
        _log.info("%s is for %s, and so not used", file, baked["MODEL_NAME"].value)
        baked = {}
    return {**baked, **given}


def export_token(given: Mapping[str, Variable]) -> None:
    """Let the hub's client find the token that is given, and none where none is: it takes `None` for a token."""
    for name in (TOKEN, OLD_TOKEN):
        os.environ.pop(name, None)
    if (token := given.get(TOKEN)) is not None and token.value not in NOT_GIVEN:
        os.environ[TOKEN] = token.value


def as_text(value: Any) -> str:
    """A value of JSON or YAML as it would be written in a variable; nothing for null."""
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _model(given: Mapping[str, Variable]) -> str | None:
    named = given.get("MODEL_NAME") or given.get("MODEL")
    return None if named is None or named.value in NOT_GIVEN else named.value.lower()


def _rename(variables: dict[str, Variable]) -> None:
    """Put variables with a former name under the present one; where both are given, the present one wins."""
    for former, name in FORMER_NAMES.items():
        if (variable := variables.pop(former, None)) is not None:
            _log.warning("%s (%s) is a former name: use %s", former, variable.source, name)
            variables.setdefault(name, variable)


def _set(variables: dict[str, Variable]) -> dict[str, Variable]:
    return {name: variable for name, variable in variables.items() if variable.value}


def _baked(file: Path) -> dict[str, Any]:
    if file == BAKED_SETTINGS_FILE and not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"BAKED_SETTINGS_FILE={str(file)!r} cannot be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f'{file} is not a JSON object of variables, as in {{"MAX_MODEL_LEN": 8192}}')
    return document
