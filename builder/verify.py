"""The `verify` command: checks a model directory against its manifest and the hub."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from builder import checkpoint, hf_hub
from builder.errors import DestinationError, IntegrityError
from builder.manifest import File, Manifest, hash_files, model_files

# The user waits for the answer: report an unreachable hub soon.
_ATTEMPTS = 3


class Verified(NamedTuple):
    """The verified manifest, and the time to read and hash its files in seconds."""

    manifest: Manifest
    hashing_s: float


def verify(directory: Path, *, offline: bool = False) -> Verified:
    """Check each file's size and hash against the manifest and the hub, and that the model loads.

    Args:
        directory: of the model.
        offline: skip the comparison with the hub.

    Raises:
        DestinationError: the directory does not exist.
        IntegrityError: there is no manifest, or files are missing or different, a line for each.
        HubError: the hub refuses, or cannot be reached.
        UnsupportedModelError: the files are unchanged, but do not load.
    """
    if not directory.is_dir():
        raise DestinationError(f"{directory} is not a directory")
    manifest = Manifest.read(directory)
    if manifest is None:
        raise IntegrityError(
            f"{directory} has no manifest: if its download was interrupted, run `python -m builder download` again; "
            "for any other model, `python -m builder manifest` writes one"
        )
    started = time.perf_counter()
    _raise_if_any(_compare_with_manifest(directory, manifest))
    hashing_s = time.perf_counter() - started
    if manifest.repository and not offline:
        repository = hf_hub.repository(manifest.repository, manifest.commit, _ATTEMPTS)
        _raise_if_any(_compare_with_hub(directory, manifest, repository))
    checkpoint.check(directory)
    return Verified(manifest, hashing_s)


def matches_hub(path: Path, file: File, remote: hf_hub.RemoteFile) -> bool:
    """Return whether the file at `path`, with this size and hash, is the same as on the hub."""
    if file.size_bytes != remote.size_bytes:
        return False
    if remote.sha256:
        return file.sha256 == remote.sha256
    return remote.git_sha1 in (None, _git_sha1(path))


def _raise_if_any(problems: Iterable[str]) -> None:
    if lines := list(problems):
        raise IntegrityError("\n".join(lines))


def _compare_with_manifest(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with each file; all are read, so that a truncated file does not hide a changed one."""
    existing = [file.path for file in manifest.files if (directory / file.path).is_file()]
    actual = {file.path: file for file in hash_files(directory, existing)}
    path_of_hash = {file.sha256: file.path for file in manifest.files}
    for expected in manifest.files:
        file = actual.get(expected.path)
        if file is None:
            yield f"{expected.path}: missing"
        elif file.sha256 != expected.sha256:
            yield f"{expected.path}: {_difference(file, expected, path_of_hash.get(file.sha256))}"
    for unexpected in sorted(set(model_files(directory)) - {file.path for file in manifest.files}):
        yield f"{unexpected}: not in the manifest"


def _difference(file: File, expected: File, same_content: str | None) -> str:
    if same_content:
        return f"swapped, it has the content of {same_content}"
    if file.size_bytes == expected.size_bytes:
        return f"changed, its sha256 is {file.sha256}"
    what = "truncated" if file.size_bytes < expected.size_bytes else "too long"
    return f"{what}, {file.size_bytes:,} bytes instead of {expected.size_bytes:,}"


def _compare_with_hub(directory: Path, manifest: Manifest, repository: hf_hub.Repository) -> Iterator[str]:
    remote = {file.path: file for file in repository.files}
    for file in manifest.files:
        if file.path not in remote:
            yield f"{file.path}: not in {repository.name} at {repository.commit}"
        elif not matches_hub(directory / file.path, file, remote[file.path]):
            yield f"{file.path}: differs from {repository.name} at {repository.commit}"


def _git_sha1(path: Path) -> str:
    """Return the file's git object id."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
