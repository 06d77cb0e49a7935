"""The `download` command: downloads a complete, verified model from the hub to a directory.

A file gets its final name when its hash is verified. The configuration comes last, and the manifest is written when all
files are there: no loader accepts an interrupted download. Partial files stay in `PARTIAL_DIR`, where the next run
resumes.
"""

from __future__ import annotations

import io
import os
import shutil
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from builder import checkpoint, hf_hub, layout
from builder.console import log
from builder.errors import BuilderError, DestinationError, DiskSpaceError, IntegrityError, UnsupportedModelError
from builder.layout import CONFIG_FILES, LOCK, MANIFEST, PARTIAL_DIR
from builder.manifest import File, Manifest, model_files, progress_bar, sha256
from builder.process_lock import process_lock
from builder.verify import matches_hub

_MARK = f"{PARTIAL_DIR}/repository"
_HASH_ATTEMPTS = 3
_CONNECTIONS = 8


def download(
    name: str, directory: Path, revision: str | None = None, *, attempts: int, update: bool = False
) -> Manifest:
    """Download the files that serving the model needs; return immediately if they are already in `directory`.

    Safe if another process downloads to the same directory, and if this process is killed.

    Args:
        name: of the repository.
        directory: a new or empty directory, or one with an interrupted download of this model.
        revision: branch, tag or commit; the main branch by default.
        attempts: for each file, if the error is transient.
        update: replace another commit of the same model in the directory.

    Returns:
        The manifest that was written.

    Raises:
        DestinationError: the directory has other files.
        HubError, HubUnreachableError, DiskSpaceError: the model cannot be downloaded, or not now.
        IntegrityError: the hub sends other content than it announces, or the files in the directory have changed.
        UnsupportedModelError: the repository has no model that vLLM loads.
    """
    if directory.exists() and not directory.is_dir():
        raise DestinationError(f"{directory} is not a directory")
    repository = hf_hub.repository(name, revision, attempts)
    files = _required_files(repository)
    directory.mkdir(parents=True, exist_ok=True)
    with process_lock(directory / LOCK, f"downloading to {directory}"):
        try:
            manifest = _prepare_directory(directory, repository, files, update=update)
            if manifest is None:
                manifest = _Download(repository, files, directory, attempts).run(revision)
            shutil.rmtree(directory / PARTIAL_DIR, ignore_errors=True)
        finally:
            (directory / LOCK).unlink(missing_ok=True)
    return manifest


def _required_files(repository: hf_hub.Repository) -> list[hf_hub.RemoteFile]:
    """Return the files that serving needs, the largest last; raise UnsupportedModelError if it cannot be served."""
    required = set(layout.required_files(file.path for file in repository.files))
    files = sorted((file for file in repository.files if file.path in required), key=lambda file: file.size_bytes)
    if not any(layout.is_weights(file.path) for file in files):
        raise UnsupportedModelError(f"{repository.name} has no weights that vLLM loads (safetensors or PyTorch)")
    if (largest := files[-1]).size_bytes > hf_hub.MAX_HTTP_BYTES:
        raise UnsupportedModelError(
            f"{largest.path} of {repository.name} has {largest.size_bytes / 1e9:.0f} GB, and the hub serves files "
            f"above {hf_hub.MAX_HTTP_BYTES / 1e9:.0f} GB only over the Xet protocol: use `hf download "
            f"{repository.name} --local-dir DIR`, then `python -m builder manifest DIR`"
        )
    return files


def _prepare_directory(
    directory: Path, repository: hf_hub.Repository, files: list[hf_hub.RemoteFile], *, update: bool
) -> Manifest | None:
    """Return the directory's manifest if its model is complete; else make the directory ready for the download.

    All checks come before the first change. Then the directory is marked as incomplete, and files of an earlier commit
    that this one does not have are removed.

    Raises:
        DestinationError: the directory has other content.
        DiskSpaceError: the model is larger than the free space.
        IntegrityError: files of the model are missing or have another size.
    """
    manifest = Manifest.read(directory)
    if manifest is None:
        mark = _Mark.read(directory) or _Mark(repository=repository.name, paths=[])
        if mark.repository != repository.name:
            raise DestinationError(
                f"{directory} has an interrupted download of {mark.repository}: use another directory"
            )
        ours = set(mark.paths)
    elif (manifest.repository, manifest.commit) == (repository.name, repository.commit):
        sizes = {directory / file.path: file.size_bytes for file in manifest.files}
        if any(not path.is_file() or path.stat().st_size != size_bytes for path, size_bytes in sizes.items()):
            raise IntegrityError(
                f"{directory} is no longer complete: see `python -m builder verify`; remove it to download it again"
            )
        return manifest
    elif update and manifest.repository == repository.name:
        ours = {file.path for file in manifest.files}
    else:
        raise DestinationError(
            f"{directory} has {manifest.repository or 'another model'} at {manifest.commit or 'no commit'}, "
            f"not {repository.name} at {repository.commit}: use another directory, or --update"
        )
    existing = model_files(directory)
    if others := [path for path in existing if path not in ours]:
        raise DestinationError(f"{directory} has other files ({others[0]}): use a new or empty directory")
    _check_disk_space(directory, repository, files, existing)

    required = {file.path for file in files}
    _Mark(repository=repository.name, paths=sorted(ours | required)).write(directory)
    for name in (MANIFEST, *CONFIG_FILES, *(path for path in existing if path not in required)):
        (directory / name).unlink(missing_ok=True)
    return None


def _check_disk_space(
    directory: Path, repository: hf_hub.Repository, files: list[hf_hub.RemoteFile], existing: list[str]
) -> None:
    """Raise DiskSpaceError if the files need more than is free; the existing ones are kept or replaced."""
    paths = [*(directory / path for path in existing), *(directory / PARTIAL_DIR).rglob("*")]
    existing_bytes = sum(path.stat().st_size for path in paths if path.is_file())
    missing = sum(file.size_bytes for file in files) - existing_bytes
    free = shutil.disk_usage(directory).free
    if missing > free:
        raise DiskSpaceError(
            f"{repository.name} needs {missing / 1e9:.2f} GB more, but {directory} has only {free / 1e9:.2f} GB free"
        )


class _Mark(BaseModel):
    """What makes an interrupted download ours: the repository, and the files that may be in the directory."""

    repository: str
    paths: list[str]

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        file = directory / _MARK
        try:
            return cls.model_validate_json(file.read_bytes()) if file.is_file() else None
        except ValidationError:
            return None

    def write(self, directory: Path) -> None:
        (directory / PARTIAL_DIR).mkdir(exist_ok=True)
        new = directory / f"{_MARK}.new"
        new.write_text(self.model_dump_json(), encoding="utf-8")
        new.replace(directory / _MARK)


class _Download:
    """The download of one model to a directory."""

    def __init__(
        self, repository: hf_hub.Repository, files: list[hf_hub.RemoteFile], directory: Path, attempts: int
    ) -> None:
        self._repository = repository
        self._files = files
        self._directory = directory
        self._attempts = attempts
        self._partial = directory / PARTIAL_DIR
        self._cancelled = threading.Event()

    def run(self, revision: str | None) -> Manifest:
        total = sum(file.size_bytes for file in self._files)
        log(f"{self._repository.name} at {self._repository.commit}: {len(self._files)} files, {total / 1e9:.2f} GB")
        last = [file for file in self._files if file.path in CONFIG_FILES]
        with progress_bar(total, "Downloading") as self._bar:
            done = self._download_all([file for file in self._files if file not in last])
            done += self._download_all(last)
        checkpoint.check(self._directory)
        manifest = Manifest.of(done, self._repository.name, revision, self._repository.commit)
        manifest.write(self._directory)
        return manifest

    def _download_all(self, files: list[hf_hub.RemoteFile]) -> list[File]:
        """Download the files in parallel; if one fails, cancel the others."""
        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            try:
                tasks = [threads.submit(self._download_file, file) for file in files]
                done, pending = wait(tasks, return_when=FIRST_EXCEPTION)
                return [task.result() for task in (*done, *pending)]
            except BaseException:
                self._cancelled.set()
                threads.shutdown(cancel_futures=True)
                raise

    def _download_file(self, remote: hf_hub.RemoteFile) -> File:
        """Download one file, verify its hash, and move it to its final name."""
        target = self._directory / remote.path
        if target.is_file():  # from an earlier run
            if (file := self._verify(target, remote)) is not None:
                self._bar.update(file.size_bytes)
                return file
            target.unlink()
        for _ in range(_HASH_ATTEMPTS):
            part = self._fetch(remote)
            if (file := self._verify(part, remote)) is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                part.replace(target)
                return file
            self._bar.update(-part.stat().st_size)
            part.unlink()
        raise IntegrityError(
            f"{remote.path}: the hub sent content with a wrong hash {_HASH_ATTEMPTS} times; it was discarded"
        )

    def _fetch(self, remote: hf_hub.RemoteFile) -> Path:
        part = self._partial / remote.path
        part.parent.mkdir(parents=True, exist_ok=True)
        with _PartialFile(part, self._bar, self._cancelled) as file:
            self._bar.update(file.seek(0, os.SEEK_END))
            hf_hub.fetch(self._repository, remote, file, self._attempts, self._cancelled)
            os.fsync(file.fileno())
        return part

    def _verify(self, path: Path, remote: hf_hub.RemoteFile) -> File | None:
        """Return the file's entry for the manifest, or None if it differs from the hub's."""
        size = path.stat().st_size
        if size != remote.size_bytes:
            return None
        file = File(path=remote.path, size_bytes=size, sha256=sha256(path))
        return file if matches_hub(path, file, remote) else None


class _PartialFile(io.FileIO):
    """A file being downloaded: writes advance the progress bar, and fail once the download is cancelled."""

    def __init__(self, path: Path, bar: tqdm[None], cancelled: threading.Event) -> None:
        super().__init__(path, "a+")
        self._bar = bar
        self._cancelled = cancelled

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        if self._cancelled.is_set():
            raise BuilderError("cancelled, as another file failed")
        rest = memoryview(data)
        while rest:
            written = super().write(rest)
            self._bar.update(written)
            rest = rest[written:]
        return len(data)
