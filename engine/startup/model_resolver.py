"""Which model the worker serves, and where it comes from."""

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

from engine.config.environment import NOT_GIVEN
from engine.config.model import Model
from engine.errors import ConfigurationError
from engine.startup import model_store

if TYPE_CHECKING:
    from engine.config.environment import Variable
    from engine.config.settings import Settings
    from engine.config.vllm_flags import Flags

TINY_NAME = "tiny"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CACHED = re.compile(r"/models--([^/]+)/snapshots/[^/]+/?$")
# Ways of loading that read a directory of files; the others (streamed from a store, made up, …) are vLLM's own affair.
_FROM_FILES = {None, "auto", "bitsandbytes", "fastsafetensors", "hf", "mistral", "pt", "safetensors"}
# Flags that may name something else on the hub.
_MORE_FROM_THE_HUB = (
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
    """Download the model's files, if they are not there yet; this may take long.

    Raises:
        ConfigurationError: they cannot be downloaded.
    """
    if model.to_download is not None:
        name, revision = model.to_download
        model_store.download(name, Path(model.path), revision)


def choose(settings: Settings, flags: Flags) -> Model:
    """The model to serve; one log line says which, and where it comes from.

    A model of the hub is looked for in the image, in `DOWNLOAD_DIR`, in the platform's cache, in the cache of the hub's
    client and on the network volume, in this order; where it is nowhere, it is to be downloaded to `DOWNLOAD_DIR`, else
    to the volume, else beside the hub's cache.

    It answers to the names that are asked for, to its hub id, and to where it is loaded from. Where that is a directory
    and would be its only name, the directory's own name comes first: errors and the models' list have one to show.

    Raises:
        ConfigurationError: on the platform, no model is named and the image holds none; or the tiny model could not be
            made.
    """
    named: str | None = flags.value("model")
    served: Sequence[str] = flags.value("served_model_name") or ()
    own_names: list[str] = []
    to_download = None
    if named is None:
        path, why, own_names = _unnamed(settings)
    elif model_store.is_dir(named) or not _HUB_ID.fullmatch(named) or flags.value("load_format") not in _FROM_FILES:
        path, why = os.path.expanduser(named), "named by MODEL_NAME"  # noqa: PTH111 (not every name is a path)
        if named.startswith(("/", "./", "../", "~")) and not model_store.is_dir(path):
            raise ConfigurationError(f"MODEL_NAME={named!r}: there is no such directory{_who_may_not(path)}")
        there = model_store.held(Path(path))
        own_names = [there.repository] if there is not None and there.repository else []
    else:
        own_names = [named]
        revision: str | None = flags.value("revision")
        download_dir: str | None = flags.value("download_dir")
        found = next(_found(settings, named, revision, download_dir), None)
        if found is not None:
            path, why = str(found[0]), f"{named}, {found[1]}"
        else:
            path = str(model_store.ours(_models(settings, download_dir), named, revision))
            to_download = (named, revision)
            why = f"{named}, which is nowhere here and is downloaded"
    _log.info("Model %s: %s", path, why)
    names = [*served, *own_names, *_hub_id(path)] or _directory_name(path)
    return Model(path, tuple(dict.fromkeys([*names, path])), to_download)


def guess_model_dir(settings: Settings, variables: Mapping[str, Variable]) -> Path | None:
    """Where the model will probably be loaded from, as far as it can be told without asking vLLM's parser."""
    named = variables.get("MODEL_NAME") or variables.get("MODEL")
    if named is None or named.value in NOT_GIVEN:
        return settings.baked_model_dir
    if model_store.is_dir(named.value) or not _HUB_ID.fullmatch(named.value):
        return Path(named.value).expanduser()
    revision = variables.get("MODEL_REVISION") or variables.get("REVISION")
    download_dir = variables.get("DOWNLOAD_DIR")
    found = _found(
        settings, named.value, revision.value if revision else None, download_dir.value if download_dir else None
    )
    return next((path for path, _ in found), None)


def enable_offline_mode(model: Model, flags: Flags) -> None:
    """Ask the hub for nothing more, in this process and its children, if all that the worker needs is in files."""
    directory = Path(model.path)
    if not model_store.is_dir(directory) or any(_is_elsewhere(flags.value(name)) for name in _MORE_FROM_THE_HUB):
        return
    if flags.value("trust_remote_code") and _has_code_elsewhere(directory):
        return
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"


def _is_elsewhere(value: Any) -> bool:
    """Whether what a flag says may be on the hub, and not in a file or directory of this machine."""
    return bool(value) and value not in ("auto", "vllm") and not (isinstance(value, str) and Path(value).exists())


def _has_code_elsewhere(directory: Path) -> bool:
    """Whether a model's configuration names code of another repository: `"AutoConfig": "org/code--module.Class"`."""
    for file in directory.glob("*config.json"):
        try:
            document = json.loads(file.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and "--" in json.dumps(document.get("auto_map")):
            return True
    return False


def _unnamed(settings: Settings) -> tuple[str, str, list[str]]:
    """The model when none is named: where it is, why this one, and its own names."""
    if (image := model_store.held(settings.baked_model_dir)) is not None:
        names = [image.repository] if image.repository else []
        return str(settings.baked_model_dir), f"the model in the image{_at(image)}", names
    if os.access(settings.baked_model_dir / "config.json", os.R_OK):
        raise ConfigurationError(
            f"{settings.baked_model_dir} has no manifest, so it may not be whole: `python -m builder manifest DIR` "
            "checks it and writes one, and MODEL_NAME serves it as it is"
        )
    if settings.on_platform:
        raise ConfigurationError(
            "MODEL_NAME is not set and the image holds no model: set MODEL_NAME to a hub id or a directory"
        )
    return _tiny(), "the tiny model, as MODEL_NAME is not set; it knows a few answers by heart", [TINY_NAME]


def _found(settings: Settings, name: str, revision: str | None, download_dir: str | None) -> Iterator[tuple[Path, str]]:
    """Where the model is on this machine, and what to call that place."""
    from huggingface_hub import constants

    image = model_store.held(settings.baked_model_dir)
    if image is not None and image.is_it(name, revision):
        yield settings.baked_model_dir, f"in the image{_at(image)}"
    platforms = settings.network_volume / "huggingface-cache" / "hub"
    caches = [(platforms, "in the platform's cache"), (Path(constants.HF_HUB_CACHE), "in the hub's cache")]
    if download_dir is not None:
        caches.insert(0, (Path(download_dir), "in DOWNLOAD_DIR"))
    for cache, place in caches:
        if (snapshot := model_store.in_cache(cache, name, revision)) is not None:
            yield snapshot, place
    directory = model_store.ours(_models(settings, download_dir), name, revision)
    if (there := model_store.held(directory)) is not None and there.is_it(name, None):
        yield directory, f"downloaded earlier{_at(there)}"


def _models(settings: Settings, download_dir: str | None) -> Path:
    """Where models are downloaded to: `DOWNLOAD_DIR`, the network volume, or where the hub's files are kept."""
    from huggingface_hub import constants

    if download_dir is not None:
        return Path(download_dir)
    base = settings.network_volume if settings.network_volume.is_dir() else Path(constants.HF_HOME)
    return base / "models"


def _who_may_not(path: str) -> str:
    """Who may not look for a directory, where that is why there seems to be none."""
    try:
        Path(path).stat()
    except PermissionError:
        return f" that user {os.getuid()}, who the worker runs as, may see"
    except OSError:
        pass
    return ""


def _at(model: model_store.Held) -> str:
    return f" at commit {model.commit}" if model.commit else ""


def _hub_id(path: str) -> list[str]:
    """The hub id of a model in a directory of the hub's cache: `models--ORG--NAME/snapshots/COMMIT`."""
    match = _CACHED.search(path)
    return [match[1].replace("--", "/", 1)] if match else []


def _directory_name(path: str) -> list[str]:
    """The name of a model of which nothing is known but its directory."""
    directory = Path(path)
    return [directory.name] if directory.name and model_store.is_dir(directory) else []


def _tiny() -> str:
    """Where the tiny model is; the builder makes it, once a machine, in a process of its own."""
    command = [sys.executable, "-m", "builder", "tiny"]
    made = subprocess.run(command, cwd=model_store.ROOT, stdout=subprocess.PIPE, check=False)
    if made.returncode:
        raise ConfigurationError("The tiny model could not be made (above is why); or set MODEL_NAME to another model")
    return made.stdout.decode().strip()
