"""Decides which model the worker serves, and where it is loaded from."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.environment import NULL_WORDS
from engine.config.model import Model
from engine.errors import ConfigurationError
from engine.startup import model_store

if TYPE_CHECKING:
    from engine.config.environment import Variable
    from engine.config.settings import Settings
    from engine.config.vllm_flags import Flags

TINY_NAME = "tiny"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CACHE_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/[^/]+/?$")
# Load formats that read a directory of files. For the others (streamed from a store, dummy, …), vLLM finds the model.
_FILE_FORMATS = {None, "auto", "bitsandbytes", "fastsafetensors", "hf", "mistral", "pt", "safetensors"}
# Flags that may name another repository of the hub.
_HUB_FLAGS = (
    "tokenizer",
    "hf_config_path",
    "generation_config",
    "enable_lora",
    "lora_modules",
    "default_mm_loras",
    "speculative_config",
    "spec_model",
)

_log = logging.getLogger(__name__)


def download(model: Model) -> None:
    """Download the model's files if they are missing, which may take minutes.

    Raises:
        ConfigurationError: the download failed.
    """
    if model.to_download is not None:
        name, revision = model.to_download
        model_store.download(name, Path(model.path), revision)


def choose(settings: Settings, flags: Flags) -> Model:
    """Return the model to serve; one log line says which, and where it is loaded from.

    A model of the hub is looked for in the image, in `DOWNLOAD_DIR`, in the platform's cache, in the cache of the hub's
    client and on the network volume, in this order. If it is in none of them, it is to be downloaded to `DOWNLOAD_DIR`;
    without that, to the volume; without a volume, to a directory next to the hub's cache.

    Its names are those that are set, its hub id, and the path that it is loaded from. If the path of a directory would
    be the only name, the directory's own name comes first, so that errors and the list of models can show one.

    Raises:
        ConfigurationError: there is no such directory; or no model is named and, on the platform, the image has none;
            or the tiny model could not be made.
    """
    named: str | None = flags.value("model")
    served: Sequence[str] = flags.value("served_model_name") or ()
    own_names: list[str] = []
    to_download = None
    if named is None:
        path, source, own_names = _default_model(settings)
    elif model_store.is_dir(named) or not _HUB_ID.fullmatch(named) or flags.value("load_format") not in _FILE_FORMATS:
        path, source = os.path.expanduser(named), "named by MODEL_NAME"  # noqa: PTH111 (not every name is a path)
        if named.startswith(("/", "./", "../", "~")) and not model_store.is_dir(path):
            raise ConfigurationError(f"MODEL_NAME={named!r}: no such directory{_access_hint(path)}")
        manifest = model_store.read_manifest(Path(path))
        own_names = [manifest.repository] if manifest is not None and manifest.repository else []
    else:
        own_names = [named]
        revision: str | None = flags.value("revision")
        download_dir: str | None = flags.value("download_dir")
        found = next(_find(settings, named, revision, download_dir), None)
        if found is not None:
            path, source = str(found[0]), f"{named}, {found[1]}"
        else:
            path = str(model_store.download_dir(_models_dir(settings, download_dir), named, revision))
            to_download = (named, revision)
            source = f"{named}, not found locally, downloading"
    _log.info("Model %s: %s", path, source)
    names = [*served, *own_names, *_hub_id(path)] or _directory_name(path)
    return Model(path, tuple(dict.fromkeys([*names, path])), to_download)


def guess_model_dir(settings: Settings, variables: Mapping[str, Variable]) -> Path | None:
    """Return the directory that the model is probably loaded from, without vLLM's parser, whose import takes long."""
    named = _value_of(variables, "MODEL_NAME", "MODEL")
    if named is None:
        return settings.baked_model_dir
    if model_store.is_dir(named) or not _HUB_ID.fullmatch(named):
        return Path(os.path.expanduser(named))  # noqa: PTH111 (`Path.expanduser` raises for an unknown user)
    revision, download_dir = _value_of(variables, "MODEL_REVISION", "REVISION"), _value_of(variables, "DOWNLOAD_DIR")
    found = _find(settings, named, revision, download_dir)
    return next((path for path, _ in found), None)


def named_model(settings: Settings, variables: Mapping[str, Variable]) -> str:
    """Return the model as the variables name it, or the directory of the image's."""
    return _value_of(variables, "MODEL_NAME", "MODEL") or str(settings.baked_model_dir)


def enable_offline_mode(model: Model, flags: Flags) -> None:
    """Prevent requests to the hub, in this process and its children, if the worker needs nothing else from it."""
    directory = Path(model.path)
    if not model_store.is_dir(directory) or any(_may_be_on_hub(flags.value(name)) for name in _HUB_FLAGS):
        return
    if flags.value("trust_remote_code") and _uses_code_of_another_repository(directory):
        return
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"


def _value_of(variables: Mapping[str, Variable], *names: str) -> str | None:
    """Return the first of the variables that is set."""
    values = (variables[name].value for name in names if name in variables)
    return next((value for value in values if value not in NULL_WORDS), None)


def _may_be_on_hub(value: Any) -> bool:
    """Return whether a flag's value may name something on the hub instead of a file or directory."""
    is_here = isinstance(value, str) and os.path.exists(value)  # noqa: PTH110 (`Path.exists` raises without permission)
    return bool(value) and value not in ("auto", "vllm") and not is_here


def _uses_code_of_another_repository(directory: Path) -> bool:
    """Return whether a model's configuration has an entry such as `"AutoConfig": "org/code--module.Class"`."""
    for file in directory.glob("*config.json"):
        try:
            document = json.loads(file.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and "--" in json.dumps(document.get("auto_map")):
            return True
    return False


def _default_model(settings: Settings) -> tuple[str, str, list[str]]:
    """Return the path, the source and the names of the model if `MODEL_NAME` is not set."""
    if (image := model_store.read_manifest(settings.baked_model_dir)) is not None:
        names = [image.repository] if image.repository else []
        return str(settings.baked_model_dir), f"the model in the image{_at_commit(image)}", names
    if os.access(settings.baked_model_dir / "config.json", os.R_OK):
        raise ConfigurationError(
            f"{settings.baked_model_dir} has no manifest, so it may be incomplete: check it and write one with "
            "`python -m builder manifest DIR`, or set MODEL_NAME to it to serve it unchecked"
        )
    if settings.on_platform:
        raise ConfigurationError(
            "MODEL_NAME is not set and the image has no model: set MODEL_NAME to a hub id or a directory"
        )
    return _make_tiny_model(), "the tiny model, as MODEL_NAME is not set; it has memorized test answers", [TINY_NAME]


def _find(settings: Settings, name: str, revision: str | None, download_dir: str | None) -> Iterator[tuple[Path, str]]:
    """Yield the directories of this machine that have the model, each with a description for the log."""
    from huggingface_hub import constants

    image = model_store.read_manifest(settings.baked_model_dir)
    if image is not None and image.matches(name, revision):
        yield settings.baked_model_dir, f"in the image{_at_commit(image)}"
    platform_cache = settings.network_volume / "huggingface-cache" / "hub"
    caches = [(platform_cache, "in the platform's cache"), (Path(constants.HF_HUB_CACHE), "in the hub's cache")]
    if download_dir is not None:
        caches.insert(0, (_absolute(download_dir), "in DOWNLOAD_DIR"))
    for cache, description in caches:
        if (snapshot := model_store.find_in_cache(cache, name, revision)) is not None:
            yield snapshot, description
    directory = model_store.download_dir(_models_dir(settings, download_dir), name, revision)
    if (downloaded := model_store.read_manifest(directory)) is not None and downloaded.matches(name, None):
        yield directory, f"downloaded earlier{_at_commit(downloaded)}"


def _models_dir(settings: Settings, download_dir: str | None) -> Path:
    """Return the directory for downloads: `DOWNLOAD_DIR`, or `models` on the network volume or in `HF_HOME`."""
    from huggingface_hub import constants

    if download_dir is not None:
        return _absolute(download_dir)
    base = settings.network_volume if model_store.is_dir(settings.network_volume) else Path(constants.HF_HOME)
    return base.absolute() / "models"


def _absolute(directory: str) -> Path:
    """Return the path of a directory; the builder's process, which downloads into it, has another working directory."""
    return Path(os.path.expanduser(directory)).absolute()  # noqa: PTH111 (`Path.expanduser` raises)


def _access_hint(path: str) -> str:
    """Return the end of a message about a missing directory, if it only seems missing for lack of permission."""
    try:
        Path(path).stat()
    except PermissionError:
        return f", or none that user {os.getuid()}, which the worker runs as, may access"
    except OSError:
        pass
    return ""


def _at_commit(manifest: model_store.ManifestInfo) -> str:
    return f" at commit {manifest.commit}" if manifest.commit else ""


def _hub_id(path: str) -> list[str]:
    """Return the hub id of a directory in a hub cache, `models--ORG--NAME/snapshots/COMMIT`; none for others."""
    match = _CACHE_SNAPSHOT.search(path)
    return [match[1].replace("--", "/", 1)] if match else []


def _directory_name(path: str) -> list[str]:
    """Return the directory's own name, for a model without another name."""
    directory = Path(path)
    return [directory.name] if directory.name and model_store.is_dir(directory) else []


def _make_tiny_model() -> str:
    """Return the directory of the tiny model, which the builder trains on first use, in a separate process."""
    command = [sys.executable, "-m", "builder", "tiny"]
    builder = subprocess.run(command, cwd=model_store.ROOT, stdout=subprocess.PIPE, check=False)
    if builder.returncode:
        raise ConfigurationError("The tiny model could not be made (see the log above): set MODEL_NAME to another")
    return builder.stdout.decode().strip()
