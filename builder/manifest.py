"""The manifest of a model directory: its files with their hashes, and where the model is from.

A download writes it last and atomically: a directory without a manifest may be incomplete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from builder.errors import IntegrityError
from builder.layout import LOCK, MANIFEST

_NEW = f"{MANIFEST}.new"
_OWN_FILES = {MANIFEST, _NEW, LOCK}
_PACKAGES = ("huggingface_hub", "safetensors", "tokenizers", "transformers")
_CHUNK_BYTES = 4 << 20
# Hashing is bound by the CPU, reading by the disk: more threads are not faster.
_THREADS = min(8, os.cpu_count() or 1)


class File(BaseModel):
    """A file of a model; `path` is relative to the model's directory."""

    model_config = ConfigDict(extra="forbid")

    path: str
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """The content of a model directory.

    Attributes:
        format: version of this schema.
        repository: hub id; None if the model is not from the hub.
        revision: the requested branch, tag or commit.
        commit: the commit to which the revision was resolved.
        made_at: in UTC.
        made_by: versions of Python and of the packages.
        files: all files of the model, sorted by path.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    repository: str | None = None
    revision: str | None = None
    commit: str | None = None
    made_at: datetime
    made_by: dict[str, str]
    files: list[File]

    @classmethod
    def of(
        cls,
        files: Iterable[File],
        repository: str | None = None,
        revision: str | None = None,
        commit: str | None = None,
    ) -> Self:
        """Return the manifest of these files, with the current time and package versions."""
        return cls(
            repository=repository,
            revision=revision,
            commit=commit,
            made_at=datetime.now(UTC).replace(microsecond=0),
            made_by={"python": platform.python_version()} | dict(_versions()),
            files=sorted(files, key=lambda file: file.path),
        )

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Return the directory's manifest, or None if there is none.

        Raises:
            IntegrityError: the manifest is invalid, or of an unknown format.
        """
        file = directory / MANIFEST
        if not file.is_file():
            return None
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            field = ".".join(str(part) for part in error.errors()[0]["loc"]) or "JSON"
            raise IntegrityError(f"{file} is not a valid manifest of this version (invalid: {field})") from None

    def write(self, directory: Path) -> None:
        """Write the manifest to the directory, atomically."""
        new = directory / _NEW
        with new.open("w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(directory / MANIFEST)

    @property
    def size_bytes(self) -> int:
        """The total size of the files."""
        return sum(file.size_bytes for file in self.files)


def of_directory(directory: Path) -> Manifest:
    """Return a new manifest of the directory's current files.

    The origin in an existing manifest is kept if its files are unchanged.

    Raises:
        IntegrityError: the existing manifest names an origin, and files have changed.
        OSError: a file cannot be read.
    """
    files = hash_files(directory, model_files(directory))
    before = Manifest.read(directory)
    if before is None or before.repository is None:
        return Manifest.of(files)
    if changed := {file.path for file in before.files} ^ {file.path for file in files} or {
        file.path for file in files if file not in before.files
    }:
        raise IntegrityError(
            f"{directory} was {before.repository} at {before.commit}, but files have changed ({min(changed)}): "
            f"download the model again, or remove {MANIFEST} to write a new one for the current files"
        )
    return Manifest.of(files, before.repository, before.revision, before.commit)


def model_files(directory: Path) -> list[str]:
    """Return the paths of the model's files in the directory, sorted.

    The builder's own files are left out, and all in directories that start with a dot: `PARTIAL_DIR`, and the metadata
    of other programs, such as `.cache` of `hf download`.
    """
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(
        str(path)
        for path in paths
        if str(path) not in _OWN_FILES and not any(part.startswith(".") for part in path.parts[:-1])
    )


def hash_files(directory: Path, paths: Iterable[str]) -> list[File]:
    """Return the files with their sizes and hashes, read in parallel, with a progress bar.

    Raises:
        OSError: a file cannot be read.
    """
    paths = list(paths)
    sizes = [(directory / path).stat().st_size for path in paths]
    with closing(progress_bar(sum(sizes), "Hashing")) as bar, ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(partial(sha256, on_read=bar.update), [directory / path for path in paths]))
    return [
        File(path=path, size_bytes=size, sha256=digest)
        for path, size, digest in zip(paths, sizes, digests, strict=True)
    ]


def sha256(path: Path, on_read: Callable[[int], object] = lambda _: None) -> str:
    """Return the file's SHA-256 in hexadecimal; `on_read` is called with the size in bytes of each chunk."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_read(count)
    return digest.hexdigest()


def progress_bar(total_bytes: int, description: str) -> tqdm[None]:
    """Return a progress bar on stderr; if that is not a terminal, it prints a line every 10 seconds."""
    in_log = {} if sys.stderr.isatty() else {"mininterval": 10.0, "ascii": True, "ncols": 80}
    return tqdm(total=total_bytes, desc=description, unit="B", unit_scale=True, file=sys.stderr, **in_log)


def _versions() -> Iterable[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
