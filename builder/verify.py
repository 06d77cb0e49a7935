"""The `verify` command: whether a model's directory is still what its manifest and the hub say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from builder import hub, structure
from builder.errors import WrongFilesError
from builder.manifest import File, Manifest, hashed, present

# Somebody waits for the answer: a hub that does not answer soon is said to be so.
_ATTEMPTS = 3


def verify(directory: Path, *, offline: bool = False) -> Manifest:
    """Check every file's size and hash against the manifest and the hub, and that the model can be loaded.

    Args:
        directory: of the model.
        offline: do not ask the hub.

    Returns:
        The directory's manifest.

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
    _complain(_sizes(directory, manifest))
    _complain(_contents(directory, manifest))
    if manifest.repository and not offline:
        source = hub.repository(manifest.repository, manifest.commit, _ATTEMPTS)
        _complain(_beside_the_hub(directory, manifest, source))
    structure.check(directory)
    return manifest


def is_the_hubs(path: Path, file: File, remote: hub.RemoteFile) -> bool:
    """Whether what lies at `path`, with this size and hash, is what the hub has."""
    if file.size_bytes != remote.size_bytes:
        return False
    if remote.sha256:
        return file.sha256 == remote.sha256
    return remote.git_sha1 in (None, _git_sha1(path))


def _complain(problems: Iterable[str]) -> None:
    if lines := list(problems):
        raise WrongFilesError("\n".join(lines))


def _sizes(directory: Path, manifest: Manifest) -> Iterator[str]:
    for file in manifest.files:
        path = directory / file.path
        if not path.is_file():
            yield f"{file.path}: missing"
        elif (size := path.stat().st_size) != file.size_bytes:
            what = "cut short" if size < file.size_bytes else "too long"
            yield f"{file.path}: {what}, {size:,} bytes of {file.size_bytes:,}"
    for stranger in sorted(set(present(directory)) - {file.path for file in manifest.files}):
        yield f"{stranger}: not in the manifest"


def _contents(directory: Path, manifest: Manifest) -> Iterator[str]:
    owners = {file.sha256: file.path for file in manifest.files}
    for file, right in zip(hashed(directory, [file.path for file in manifest.files]), manifest.files, strict=True):
        if file.sha256 != right.sha256:
            owner = owners.get(file.sha256)
            yield f"{file.path}: " + (
                f"swapped, it holds {owner}" if owner else f"changed, its sha256 is {file.sha256}"
            )


def _beside_the_hub(directory: Path, manifest: Manifest, source: hub.Repository) -> Iterator[str]:
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
