"""The `tiny` command: the tiny model, trained once a machine, kept in a cache and copied where it is wanted.

The cache holds one directory for each key, and the key is a hash over everything that the model is made from. A
directory is written under another name and renamed when it is whole, under a lock that other processes wait for: what
lies under a key is always a whole model. Nothing here imports torch until a model has to be trained.
"""

from __future__ import annotations

import filecmp
import hashlib
import importlib.metadata
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from builder.errors import DestinationError, MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_HERE = Path(__file__).parent
SOURCES = (_HERE / "corpus.py", _HERE / "training.py")
PACKAGES = ("torch", "transformers", "tokenizers")

# A directory with weights and no config.json is not a model to any loader, so this file is copied last.
_LAST_FILE = "config.json"
_HALF_COPIED = ".half-copied"


def tiny_model(directory: Path | None = None) -> Path:
    """Return where the tiny model lies: the cache, or `directory` with the model copied into it.

    Raises DestinationError, MissingPackageError, TrainingError or OSError.
    """
    if directory is not None and directory.exists() and not directory.is_dir():
        raise DestinationError(f"{directory} is not a directory")
    model = cached(cache_root() / "tiny", key_of(SOURCES, versions_of(PACKAGES)), _train)
    if directory is None:
        return model
    copy_into(model, directory)
    return directory


def cache_root(environment: Mapping[str, str] = os.environ) -> Path:
    """Return this project's cache directory; an empty variable counts as unset, as XDG has it."""
    if own := environment.get("VLLM_SERVERLESS_CACHE"):
        return Path(own)
    if shared := environment.get("XDG_CACHE_HOME"):
        return Path(shared) / "vllm-serverless"
    return Path.home() / ".cache" / "vllm-serverless"


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions without importing anything; raise MissingPackageError for one that is missing."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise MissingPackageError(f"training the tiny model needs {package}, which is not installed") from None
    return versions


def key_of(sources: tuple[Path, ...], versions: Mapping[str, str]) -> str:
    """Return 16 hex digits that change with the sources' text and with the versions."""
    parts = [source.read_bytes() for source in sources]
    parts += [f"{package}=={version}".encode() for package, version in sorted(versions.items())]
    # Hashes of the parts, not the parts: moving a byte from one part to the next has to make another key.
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def cached(cache: Path, key: str, make: Callable[[Path], None]) -> Path:
    """Return `cache/key`, having `make` fill it first if it is not there.

    `make` gets an empty directory beside it, which takes the key's name only once `make` has returned. If `make`
    raises or the process dies, there is no model, and the next call starts afresh.
    """
    model = cache / key
    if model.is_dir():
        return model
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{key}.lock"):
        if model.is_dir():  # made by the process that held the lock before us
            return model
        unfinished = cache / f"{key}.unfinished"
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir()
        try:
            make(unfinished)
            unfinished.rename(model)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return model


def copy_into(model: Path, directory: Path) -> None:
    """Make `directory` hold the model's files.

    A directory that holds some of exactly these files already, because an earlier copy was cut short, is completed.
    Raises DestinationError, touching nothing, if it holds anything else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    wanted = sorted((file.name for file in model.iterdir()), key=lambda name: (name == _LAST_FILE, name))
    present = {entry.name for entry in directory.iterdir()} - {_HALF_COPIED}
    strangers = sorted(
        name
        for name in present
        if name not in wanted
        or not (directory / name).is_file()
        or not filecmp.cmp(model / name, directory / name, shallow=False)
    )
    if strangers:
        raise DestinationError(
            f"{directory} is not empty and holds something other than this model ({strangers[0]}); "
            "name a new or an empty directory"
        )
    half_copied = directory / _HALF_COPIED
    for name in wanted:
        if name not in present:
            shutil.copyfile(model / name, half_copied)  # contents only: modes come from this process's umask
            half_copied.replace(directory / name)
    half_copied.unlink(missing_ok=True)


def _train(directory: Path) -> None:
    """Train the real model; the imports alone take seconds."""
    _say("no tiny model for these versions in the cache yet: training it (about a minute on two cores)")
    from builder.tiny_model import training  # torch and transformers: seconds, and needed here only

    training.train(directory)
    # safetensors writes its file for its owner alone; a cache or an image may be read by another user.
    for file in directory.iterdir():
        file.chmod(0o644)
    _say("the tiny model is trained and every answer of its corpus is right")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an inter-process lock; say so when that means waiting."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say("another process is training the tiny model: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _say(text: str) -> None:
    sys.stderr.write(f"builder: {text}\n")
    sys.stderr.flush()
