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
    file = Path(environment.get("BAKED_SETTINGS_FILE") or BAKED_SETTINGS_FILE)
    baked = {name.upper(): Variable(as_text(value), str(file)) for name, value in _baked(file).items()}
    own = {name.upper(): Variable(value.strip(), ENVIRONMENT) for name, value in environment.items()}
    given = _set(own)
    if TOKEN not in given and OLD_TOKEN in given:  # As the hub's client does.
        given[TOKEN] = Variable(given[OLD_TOKEN].value, f"{ENVIRONMENT}, {OLD_TOKEN}")
    if "MODEL_NAME" in baked and _model(given) not in (None, baked["MODEL_NAME"].value.lower()):
        _log.info("%s is for %s, and so not used", file, baked["MODEL_NAME"].value)
        baked = {}
    return {name: variable for name, variable in {**baked, **given}.items() if variable.value}


def as_text(value: Any) -> str:
    """A value of JSON or YAML as it would be written in a variable; nothing for null."""
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _model(given: Mapping[str, Variable]) -> str | None:
    named = given.get("MODEL_NAME") or given.get("MODEL")
    return named.value.lower() if named else None


def _set(variables: dict[str, Variable]) -> dict[str, Variable]:
    return {name: variable for name, variable in variables.items() if variable.value}


def _baked(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} is not a JSON file: {error}") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f'{file} is not a JSON object of variables, as in {{"MAX_MODEL_LEN": 8192}}')
    return document
