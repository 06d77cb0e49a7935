"""Which model the worker serves: the one that is named, the one in the image, or the tiny one."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigurationError
from engine.settings import Settings

_ROOT = Path(__file__).resolve().parent.parent
TINY_NAME = "tiny"
_CACHED = re.compile(r"/models--([^/]+)/snapshots/[^/]+/?$")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """A model to serve: where vLLM loads it from, and the names that it answers to, first of them its own."""

    path: str
    names: tuple[str, ...]


def choose(settings: Settings, named: str | None, served_names: Sequence[str] = ()) -> Model:
    """The model to serve; one log line says which and why.

    It answers to the names that are asked for, to its hub id, and to where it is loaded from.

    Args:
        settings: the worker's.
        named: hub id or directory of the model, if one is named.
        served_names: the names that are asked for.

    Raises:
        ConfigurationError: on the platform, no model is named and the image holds none; or the tiny model could not be
            made.
    """
    own_names: list[str] = []
    if named:
        if named.startswith(("/", "./", "../", "~")) and not Path(named).is_dir():
            raise ConfigurationError(f"MODEL_NAME is {named!r}, and there is no such directory")
        path, why = named, "named by MODEL_NAME"
    elif (settings.baked_model_dir / "config.json").is_file():
        path, why = str(settings.baked_model_dir), "the model in the image"
    elif settings.on_platform:
        raise ConfigurationError(
            "MODEL_NAME is not set and the image holds no model: set MODEL_NAME to a hub id or a directory"
        )
    else:
        path, why = _tiny(), "the tiny model, as MODEL_NAME is not set; it knows a few answers by heart"
        own_names = [TINY_NAME]
    _log.info("Model %s: %s", path, why)
    return Model(path, tuple(dict.fromkeys([*served_names, *own_names, *_hub_id(path), path])))


def _hub_id(path: str) -> list[str]:
    """The hub id of a model in a directory of the hub's cache: `models--ORG--NAME/snapshots/COMMIT`."""
    match = _CACHED.search(path)
    return [match[1].replace("--", "/", 1)] if match else []


def _tiny() -> str:
    """Where the tiny model is; the builder makes it, once a machine, in a process of its own."""
    made = subprocess.run([sys.executable, "-m", "builder", "tiny"], cwd=_ROOT, stdout=subprocess.PIPE, check=False)
    if made.returncode:
        raise ConfigurationError("The tiny model could not be made (above is why); or set MODEL_NAME to another model")
    return made.stdout.decode().strip()
