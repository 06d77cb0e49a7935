"""Which model the worker serves: the one that is named, the one in the image, or the tiny one."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigurationError
from engine.settings import Settings

_ROOT = Path(__file__).resolve().parent.parent
TINY_NAME = "tiny"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """A model to serve: where vLLM loads it from, and the names that it answers to, first of them its own."""

    path: str
    names: tuple[str, ...]


def choose(settings: Settings) -> Model:
    """The model to serve; one log line says which and why.

    Raises:
        ConfigurationError: on the platform, no model is named and the image holds none; or the tiny model could not be
            made.
    """
    if settings.model_name:
        if settings.model_name.startswith(("/", "./", "../", "~")) and not Path(settings.model_name).is_dir():
            raise ConfigurationError(f"MODEL_NAME is {settings.model_name!r}, and there is no such directory")
        return _chosen(settings.model_name, "named by MODEL_NAME", settings)
    if (settings.baked_model_dir / "config.json").is_file():
        return _chosen(str(settings.baked_model_dir), "the model in the image", settings)
    if settings.on_platform:
        raise ConfigurationError(
            "MODEL_NAME is not set and the image holds no model: set MODEL_NAME to a hub id or a directory"
        )
    return _chosen(_tiny(), "the tiny model, as MODEL_NAME is not set; it knows a few answers by heart", settings)


def _chosen(path: str, why: str, settings: Settings) -> Model:
    own = (TINY_NAME,) if why.startswith("the tiny") else ()
    names = tuple(dict.fromkeys([*settings.served_model_name, *own, path]))
    _log.info("Model %s: %s", path, why)
    return Model(path, names)


def _tiny() -> str:
    """Where the tiny model is; the builder makes it, once a machine, in a process of its own."""
    made = subprocess.run([sys.executable, "-m", "builder", "tiny"], cwd=_ROOT, stdout=subprocess.PIPE, check=False)
    if made.returncode:
        raise ConfigurationError("The tiny model could not be made (above is why); or set MODEL_NAME to another model")
    return made.stdout.decode().strip()
