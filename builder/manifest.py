"""The `manifest` of a model's directory: what it holds, where that is from, and who wrote it.

It is written last and atomically: a directory without one is not whole.
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

from builder.errors import WrongFilesError

NAME = "model-manifest.json"
# Where a download keeps what it has begun, and what tells other processes that it is at work.
UNFINISHED = ".unfinished"
LOCK = ".lock"
_NEW = f"{NAME}.new"
_NOT_THE_MODELS = {NAME, _NEW, UNFINISHED, LOCK}
_PACKAGES = ("huggingface_hub", "safetensors", "tokenizers", "transformers")
_CHUNK_BYTES = 4 << 20
# Hashing is bound by the processor, reading by the disk: more threads than these gain nothing.
_THREADS = min(8, os.cpu_count() or 1)


class File(BaseModel):
    """One file of a model: its path within the directory, its size, and what is in it."""

    model_config = ConfigDict(extra="forbid")

    path: str
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a model's directory holds.

    Attributes:
        repository: on the hub; None if the model is from elsewhere.
        revision: that was asked for: a branch, a tag or a commit.
        commit: what the revision meant at that time.
        made_at: in UTC.
        made_by: versions of Python and of the packages.
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
        """The manifest of these files, made now and by these versions."""
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
        """The directory's manifest, or None if there is none.

        Raises:
            WrongFilesError: it is not one that this version reads.
        """
        file = directory / NAME
        if not file.is_file():
            return None
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "its JSON"
            raise WrongFilesError(f"{file} is no manifest that this version reads ({where} is wrong)") from None

    def write(self, directory: Path) -> None:
        """Write it into the directory: whole or not at all, and after everything else has reached the disk."""
        new = directory / _NEW
        with new.open("w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(directory / NAME)

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(file.size_bytes for file in self.files)


def of_directory(directory: Path) -> Manifest:
    """The manifest of what the directory holds now.

    The origin that a manifest there names is kept, if its files are still those.

    Raises:
        WrongFilesError: they are not.
        OSError: a file cannot be read.
    """
    files = hashed(directory, present(directory))
    before = Manifest.read(directory)
    if before is None or before.repository is None:
        return Manifest.of(files)
    if changed := {file.path for file in before.files} ^ {file.path for file in files} or {
        file.path for file in files if file not in before.files
    }:
        raise WrongFilesError(
            f"{directory} was {before.repository} at {before.commit}, and is not any more ({min(changed)}): "
            f"download it anew, or remove {NAME} to have one of what is there now"
        )
    return Manifest.of(files, before.repository, before.revision, before.commit)


def present(directory: Path) -> list[str]:
    """The paths of all files in the directory that are the model's, sorted."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and path.relative_to(directory).parts[0] not in _NOT_THE_MODELS
    )


def hashed(directory: Path, paths: Iterable[str]) -> list[File]:
    """The files with their sizes and hashes, read in parallel, with a progress bar on a terminal.

    Raises:
        OSError: one cannot be read.
    """
    paths = list(paths)
    sizes = [(directory / path).stat().st_size for path in paths]
    with closing(progress(sum(sizes), "Hashing")) as bar, ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(partial(sha256, seen=bar.update), [directory / path for path in paths]))
    return [
        File(path=path, size_bytes=size, sha256=digest)
        for path, size, digest in zip(paths, sizes, digests, strict=True)
    ]


def sha256(path: Path, seen: Callable[[int], object] = lambda _: None) -> str:
    """The file's SHA-256 in hexadecimal; `seen` is told how many bytes have been read since it was told last."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            seen(count)
    return digest.hexdigest()


def progress(total_bytes: int, what: str) -> tqdm[None]:
    """A progress bar on stderr; where that is no terminal, a line now and then."""
    seldom = {} if sys.stderr.isatty() else {"mininterval": 10.0, "ascii": True, "ncols": 80}
    return tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, file=sys.stderr, **seldom)


def _versions() -> Iterable[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
