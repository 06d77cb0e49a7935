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

from tqdm import tqdm

from builder import checkpoint, hf_hub, layout
from builder.console import log
from builder.errors import BuilderError, DestinationError, DiskSpaceError, IntegrityError, UnsupportedModelError
from builder.layout import CONFIG_FILES, LOCK, MANIFEST, PARTIAL_DIR
from builder.manifest import File, Manifest, model_files, progress_bar, sha256
from builder.process_lock import process_lock
from builder.verify import matches_hub

_HASH_ATTEMPTS = 3
_CONNECTIONS = 8


def download(
    name: str,
    directory: Path,
    revision: str | None = None,
    *,
    attempts: int = hf_hub.ATTEMPTS,
    update: bool = False,
) -> Manifest:
    """Download the files that serving the model needs; return soon if they are in `directory` already.

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
    directory.mkdir(parents=True, exist_ok=True)
    with process_lock(directory / LOCK, f"downloading to {directory}"):
        manifest = _read_existing(directory, repository, update=update)
        if manifest is None:
            manifest = _Download(repository, directory, attempts).run(revision)
        shutil.rmtree(directory / PARTIAL_DIR, ignore_errors=True)
        (directory / LOCK).unlink(missing_ok=True)
    return manifest


def _read_existing(directory: Path, repository: hf_hub.Repository, *, update: bool) -> Manifest | None:
    """Return the directory's manifest if its model is complete; None if there is something to download.

    With `update`, another commit of the model is first marked as incomplete.

    Raises:
        DestinationError: the directory has other content.
        IntegrityError: files of the model are missing or have another size.
    """
    manifest = Manifest.read(directory)
    if manifest is None:
        mark = directory / PARTIAL_DIR / "repository"
        in_progress = mark.read_text(encoding="utf-8") if mark.is_file() else None
        if in_progress is None and (unexpected_files := model_files(directory)):
            raise DestinationError(f"{directory} is not empty ({unexpected_files[0]}): use a new or empty directory")
        if in_progress not in (None, repository.name):
            raise DestinationError(f"{directory} has an interrupted download of {in_progress}: use another directory")
        return None
    if (manifest.repository, manifest.commit) != (repository.name, repository.commit):
        if update and manifest.repository == repository.name:
            _mark_in_progress(directory, repository)
            for name in (MANIFEST, *CONFIG_FILES):
                (directory / name).unlink(missing_ok=True)
            return None
        raise DestinationError(
            f"{directory} has {manifest.repository or 'another model'} at {manifest.commit or 'no commit'}, "
            f"not {repository.name} at {repository.commit}: use another directory, or --update"
        )
    sizes = {directory / file.path: file.size_bytes for file in manifest.files}
    if any(not path.is_file() or path.stat().st_size != size_bytes for path, size_bytes in sizes.items()):
        raise IntegrityError(
            f"{directory} is no longer complete: see `python -m builder verify`; remove it to download it again"
        )
    return manifest


def _mark_in_progress(directory: Path, repository: hf_hub.Repository) -> None:
    """Record which model is being downloaded to the directory."""
    (directory / PARTIAL_DIR).mkdir(exist_ok=True)
    (directory / PARTIAL_DIR / "repository").write_text(repository.name, encoding="utf-8")


class _Download:
    """The download of one model to a directory."""

    def __init__(self, repository: hf_hub.Repository, directory: Path, attempts: int) -> None:
        self._repository = repository
        self._directory = directory
        self._attempts = attempts
        required = set(layout.required_files(file.path for file in repository.files))
        self._files = sorted(
            (file for file in repository.files if file.path in required), key=lambda file: file.size_bytes
        )
        if not any(layout.is_weights(file.path) for file in self._files):
            raise UnsupportedModelError(f"{repository.name} has no weights that vLLM loads (safetensors or PyTorch)")
        if (largest := self._files[-1]).size_bytes > hf_hub.MAX_HTTP_BYTES:
            raise UnsupportedModelError(
                f"{largest.path} of {repository.name} has {largest.size_bytes / 1e9:.0f} GB, and the hub serves files "
                f"above {hf_hub.MAX_HTTP_BYTES / 1e9:.0f} GB only over the Xet protocol: use `hf download "
                f"{repository.name} --local-dir DIR`, then `python -m builder manifest DIR`"
            )
        self._partial = directory / PARTIAL_DIR
        self._cancelled = threading.Event()

    def run(self, revision: str | None) -> Manifest:
        _mark_in_progress(self._directory, self._repository)
        self._remove_stale_files()
        self._check_disk_space()
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

    def _remove_stale_files(self) -> None:
        """Remove files of an earlier commit that this one does not have."""
        required = {file.path for file in self._files}
        for path in model_files(self._directory):
            if path not in required:
                (self._directory / path).unlink()

    def _check_disk_space(self) -> None:
        existing = sum(file.stat().st_size for file in self._directory.rglob("*") if file.is_file())
        missing = sum(file.size_bytes for file in self._files) - existing
        free = shutil.disk_usage(self._directory).free
        if missing > free:
            raise DiskSpaceError(
                f"{self._repository.name} needs {missing / 1e9:.2f} GB more, but {self._directory} has only "
                f"{free / 1e9:.2f} GB free"
            )

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
