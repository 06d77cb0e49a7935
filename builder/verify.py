"""The `verify` command: whether a model's directory is still what its manifest and the hub say."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from builder import checkpoint, hf_hub
from builder.errors import WrongFilesError
from builder.manifest import File, Manifest, hashed, present

# Somebody waits for the answer: a hub that does not answer soon is said to be so.
_ATTEMPTS = 3


class Verified(NamedTuple):
    """What is right: the manifest, and how long reading and hashing its files took, in seconds."""

    manifest: Manifest
    hashing_s: float


def verify(directory: Path, *, offline: bool = False) -> Verified:
    """Check every file's size and hash against the manifest and the hub, and that the model can be loaded.

    Args:
        directory: of the model.
        offline: do not ask the hub.

    Raises:
        WrongFilesError: files are missing or wrong, or there is no manifest; a line for each.
        HubError: the hub cannot be asked.
        UnservableError: the files are right, and cannot be loaded.
    """
    if not directory.is_dir():
        raise WrongFilesError(f"{directory} is not a directory")
    manifest = Manifest.read(directory)
    if manifest is None:
        raise WrongFilesError(
            f"{directory} has no manifest: its download was not finished (run `python -m builder download` again), "
            "or it was made otherwise (then `python -m builder manifest` writes one)"
        )
    begun = time.perf_counter()
    _complain(_against_manifest(directory, manifest))
    hashing_s = time.perf_counter() - begun
    if manifest.repository and not offline:
        source = hf_hub.repository(manifest.repository, manifest.commit, _ATTEMPTS)
        _complain(_beside_the_hub(directory, manifest, source))
    checkpoint.check(directory)
    return Verified(manifest, hashing_s)


def is_the_hubs(path: Path, file: File, remote: hf_hub.RemoteFile) -> bool:
    """Whether what lies at `path`, with this size and hash, is what the hub has."""
    if file.size_bytes != remote.size_bytes:
        return False
    if remote.sha256:
        return file.sha256 == remote.sha256
    return remote.git_sha1 in (None, _git_sha1(path))


def _complain(problems: Iterable[str]) -> None:
    if lines := list(problems):
        raise WrongFilesError("\n".join(lines))


def _against_manifest(directory: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with each file, all of them read: one that is cut short does not hide one that is changed."""
    there = [file.path for file in manifest.files if (directory / file.path).is_file()]
    held = {file.path: file for file in hashed(directory, there)}
    owners = {file.sha256: file.path for file in manifest.files}
    for right in manifest.files:
        file = held.get(right.path)
        if file is None:
            yield f"{right.path}: missing"
        elif file.sha256 != right.sha256:
            yield f"{right.path}: {_difference(file, right, owners.get(file.sha256))}"
    for stranger in sorted(set(present(directory)) - {file.path for file in manifest.files}):
        yield f"{stranger}: not in the manifest"


def _difference(file: File, right: File, owner: str | None) -> str:
    if owner:
        return f"swapped, it holds {owner}"
    if file.size_bytes == right.size_bytes:
        return f"changed, its sha256 is {file.sha256}"
    what = "cut short" if file.size_bytes < right.size_bytes else "too long"
    return f"{what}, {file.size_bytes:,} bytes of {right.size_bytes:,}"


def _beside_the_hub(directory: Path, manifest: Manifest, source: hf_hub.Repository) -> Iterator[str]:
    remote = {file.path: file for file in source.files}
    for file in manifest.files:
        if file.path not in remote:
            yield f"{file.path}: {source.name} has no such file at {source.commit}"
        elif not is_the_hubs(directory / file.path, file, remote[file.path]):
            yield f"{file.path}: not what {source.name} has at {source.commit}"


def _git_sha1(path: Path) -> str:
    """The name that git gives to the content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
