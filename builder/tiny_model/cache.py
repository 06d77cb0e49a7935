"""The `tiny` command: trains the tiny model once per machine, caches it and copies it on request.

The cache has a directory for each key, a hash of everything that determines the model. A directory is filled under
another name and renamed when it is complete, under a lock that other processes wait for: a directory with a key's name
is always complete. torch is imported only if a model must be trained.
"""

from __future__ import annotations

import filecmp
import hashlib
import importlib.metadata
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from builder.console import log
from builder.errors import DestinationError, MissingPackageError
from builder.layout import MANIFEST, cache_root
from builder.process_lock import process_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_HERE = Path(__file__).parent
SOURCES = (_HERE / "corpus.py", _HERE / "training.py")
PACKAGES = ("torch", "transformers", "tokenizers")

# No loader accepts a directory without config.json, so this file is copied last.
_LAST_FILE = "config.json"
_PARTIAL_COPY = ".partial"


def tiny_model(directory: Path | None = None) -> Path:
    """Return the directory of the tiny model: in the cache, or `directory` with a copy of it.

    Raises:
        DestinationError: `directory` is a file or has other files.
        MissingPackageError, TrainingError, OSError: the model cannot be made.
    """
    if directory is not None and directory.exists() and not directory.is_dir():
        raise DestinationError(f"{directory} is not a directory")
    model = cached(cache_root() / "tiny", key_of(SOURCES, versions_of(PACKAGES)), _train)
    if directory is None:
        return model
    copy_into(model, directory)
    return directory


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions without importing the packages; raise MissingPackageError for a missing one."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise MissingPackageError(f"training the tiny model needs {package}, which is not installed") from None
    return versions


def key_of(sources: tuple[Path, ...], versions: Mapping[str, str]) -> str:
    """Return a hash of the sources' contents and the versions, 16 hex digits."""
    parts = [source.read_bytes() for source in sources]
    parts += [f"{package}=={version}".encode() for package, version in sorted(versions.items())]
    # The parts are hashed separately: moving a byte from one part to the next must change the key.
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def cached(cache: Path, key: str, make: Callable[[Path], None]) -> Path:
    """Return `cache/key`; `make` fills it if it does not exist.

    `make` gets an empty directory, which is renamed to the key when `make` has returned. If `make` raises or the
    process dies, `cache/key` does not exist, and the next call starts over.
    """
    model = cache / key
    if model.is_dir():
        return model
    cache.mkdir(parents=True, exist_ok=True)
    with process_lock(cache / f"{key}.lock", f"making {model}"):
        if model.is_dir():  # made by the previous holder of the lock
            return model
        partial = cache / f"{key}.partial"
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            make(partial)
            partial.rename(model)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return model


def copy_into(model: Path, directory: Path) -> None:
    """Copy the model's files to `directory`; complete an earlier copy that was interrupted.

    Raises:
        DestinationError: the directory has other files, except a manifest; nothing is changed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted((file.name for file in model.iterdir()), key=lambda name: (name == _LAST_FILE, name))
    existing = {entry.name for entry in directory.iterdir()} - {_PARTIAL_COPY, MANIFEST}
    unexpected = sorted(
        name
        for name in existing
        if name not in names
        or not (directory / name).is_file()
        or not filecmp.cmp(model / name, directory / name, shallow=False)
    )
    if unexpected:
        raise DestinationError(
            f"{directory} has files that are not part of this model ({unexpected[0]}); use a new or empty directory"
        )
    partial = directory / _PARTIAL_COPY
    for name in names:
        if name not in existing:
            shutil.copyfile(model / name, partial)  # contents only: modes come from this process's umask
            partial.replace(directory / name)
    partial.unlink(missing_ok=True)


def _train(directory: Path) -> None:
    log("the tiny model for these versions is not cached: training it (about a minute on two cores)")
    from builder.tiny_model import training  # torch and transformers take seconds to import

    training.train(directory)
    # safetensors writes its file with mode 0600; a cache or an image may be read by another user.
    for file in directory.iterdir():
        file.chmod(0o644)
    log("the tiny model is trained: all answers of its corpus are right")
