"""The `download` command: a model of the hub, whole and verified, in a directory.

A file gets its name in the directory when its hash is right, `config.json` last of them, and the manifest when all are
there: a directory that was left half-way is no model to any loader. What a broken download has got stays under
`.unfinished`, and the next one goes on from there.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from builder import checkpoint, hf_hub, layout
from builder.errors import BuilderError, DestinationError, DiskSpaceError, UnservableError, WrongFilesError
from builder.manifest import LOCK, NAME, UNFINISHED, File, Manifest, present, progress, sha256
from builder.verify import is_the_hubs

# No loader takes a directory without one of these for a model.
_LAST = ("config.json", "params.json")
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_WRONG_CONTENTS = 3
_PARALLEL = 8


def download(
    name: str,
    directory: Path,
    revision: str | None = None,
    *,
    attempts: int = hf_hub.ATTEMPTS,
    update: bool = False,
) -> Manifest:
    """Make `directory` hold the files that serving the model needs; quick when it does already.

    Safe against another process that does the same, and against being killed.

    Args:
        name: of the repository.
        directory: a new or an empty one, or one where a download of this model was left half-way.
        revision: branch, tag or commit; the main branch without it.
        attempts: for each file, where what went wrong may pass.
        update: let another commit of the same model in the directory become this one.

    Returns:
        The manifest that was written.

    Raises:
        DestinationError: the directory holds something else.
        HubError, HubUnreachableError, DiskSpaceError: the model cannot be had, or not now.
        WrongFilesError: the hub sends something else than it announces.
        UnservableError: the repository holds no model that vLLM loads.
    """
    if directory.exists() and not directory.is_dir():
        raise DestinationError(f"{directory} is not a directory")
    source = hf_hub.repository(name, revision, attempts)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        whole = _present(directory, source, update=update)
        if whole is None:
            whole = _Download(source, directory, attempts).run(revision)
        shutil.rmtree(directory / UNFINISHED, ignore_errors=True)
        (directory / LOCK).unlink(missing_ok=True)
    return whole


def _present(directory: Path, source: hf_hub.Repository, *, update: bool) -> Manifest | None:
    """The directory's manifest if it holds the model already.

    Another commit of it that may be updated is no whole model any more.

    Raises:
        DestinationError: it holds something else.
    """
    manifest = Manifest.read(directory)
    if manifest is None:
        begun = directory / UNFINISHED / "repository"
        other = begun.read_text(encoding="utf-8") if begun.is_file() else None
        if other is None and (strangers := present(directory)):
            raise DestinationError(f"{directory} holds something else ({strangers[0]}): name a new or an empty one")
        if other not in (None, source.name):
            raise DestinationError(f"{directory} holds a download of {other}, left half-way: name another directory")
        return None
    if (manifest.repository, manifest.commit) != (source.name, source.commit):
        if update and manifest.repository == source.name:
            _begin(directory, source)
            for name in (NAME, *_LAST):
                (directory / name).unlink(missing_ok=True)
            return None
        raise DestinationError(
            f"{directory} holds {manifest.repository or 'another model'} at {manifest.commit or 'no commit'}, "
            f"not {source.name} at {source.commit}: name another directory, or --update it"
        )
    paths = {directory / file.path: file.size_bytes for file in manifest.files}
    if any(not path.is_file() or path.stat().st_size != size_bytes for path, size_bytes in paths.items()):
        raise WrongFilesError(
            f"{directory} is not whole any more: `python -m builder verify` says why; remove it to load it anew"
        )
    return manifest


def _begin(directory: Path, source: hf_hub.Repository) -> None:
    """Say whose the directory is from now on."""
    (directory / UNFINISHED).mkdir(exist_ok=True)
    (directory / UNFINISHED / "repository").write_text(source.name, encoding="utf-8")


class _Download:
    """One model on its way into a directory."""

    def __init__(self, source: hf_hub.Repository, directory: Path, attempts: int) -> None:
        self._source = source
        self._directory = directory
        self._attempts = attempts
        wanted = set(layout.needed(file.path for file in source.files))
        self._files = sorted((file for file in source.files if file.path in wanted), key=lambda file: file.size_bytes)
        if not any(layout.is_weights(file.path) for file in self._files):
            raise UnservableError(f"{source.name} holds no weights that vLLM loads (safetensors or PyTorch)")
        if (largest := self._files[-1]).size_bytes > hf_hub.LARGEST_BYTES:
            raise UnservableError(
                f"{largest.path} of {source.name} has {largest.size_bytes / 1e9:.0f} GB, and the hub gives files above "
                f"{hf_hub.LARGEST_BYTES / 1e9:.0f} GB over the Xet protocol alone: load the model with `hf download "
                f"{source.name} --local-dir DIR`, then write its manifest with `python -m builder manifest DIR`"
            )
        self._unfinished = directory / UNFINISHED
        self._stop = threading.Event()

    def run(self, revision: str | None) -> Manifest:
        _begin(self._directory, self._source)
        self._remove_what_is_not_of_it()
        self._look_for_room()
        total = sum(file.size_bytes for file in self._files)
        _say(f"{self._source.name} at {self._source.commit}: {len(self._files)} files, {total / 1e9:.2f} GB")
        last = [file for file in self._files if file.path in _LAST]
        with progress(total, "Downloading") as self._bar:
            done = self._all([file for file in self._files if file not in last])
            done += self._all(last)
        checkpoint.check(self._directory)
        manifest = Manifest.of(done, self._source.name, revision, self._source.commit)
        manifest.write(self._directory)
        return manifest

    def _remove_what_is_not_of_it(self) -> None:
        """Take away what an earlier commit has left."""
        wanted = {file.path for file in self._files}
        for path in present(self._directory):
            if path not in wanted:
                (self._directory / path).unlink()

    def _look_for_room(self) -> None:
        there = sum(file.stat().st_size for file in self._directory.rglob("*") if file.is_file())
        missing = sum(file.size_bytes for file in self._files) - there
        free = shutil.disk_usage(self._directory).free
        if missing > free:
            raise DiskSpaceError(
                f"{self._source.name} needs {missing / 1e9:.2f} GB more, and the disk of {self._directory} has "
                f"{free / 1e9:.2f} GB free"
            )

    def _all(self, files: list[hf_hub.RemoteFile]) -> list[File]:
        """Have all of them, some at once; when one cannot be had, the others stop where they are."""
        with ThreadPoolExecutor(_PARALLEL) as threads:
            try:
                tasks = [threads.submit(self._one, file) for file in files]
                done, others = wait(tasks, return_when=FIRST_EXCEPTION)
                return [task.result() for task in (*done, *others)]
            except BaseException:
                self._stop.set()
                threads.shutdown(cancel_futures=True)
                raise

    def _one(self, remote: hf_hub.RemoteFile) -> File:
        """Have one file under its name, with its hash checked."""
        target = self._directory / remote.path
        if target.is_file():  # An earlier run has put it there.
            if (file := self._checked(target, remote)) is not None:
                self._bar.update(file.size_bytes)
                return file
            target.unlink()
        for _ in range(_WRONG_CONTENTS):
            part = self._fetched(remote)
            if (file := self._checked(part, remote)) is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                part.replace(target)
                return file
            self._bar.update(-part.stat().st_size)
            part.unlink()
        raise WrongFilesError(
            f"{remote.path}: the hub sent something else than it announces, {_WRONG_CONTENTS} times; nothing was kept"
        )

    def _fetched(self, remote: hf_hub.RemoteFile) -> Path:
        part = self._unfinished / remote.path
        part.parent.mkdir(parents=True, exist_ok=True)
        with _Part(part, self._bar, self._stop) as file:
            self._bar.update(file.seek(0, os.SEEK_END))
            hf_hub.fetch(self._source, remote, file, self._attempts, self._stop)
            os.fsync(file.fileno())
        return part

    def _checked(self, path: Path, remote: hf_hub.RemoteFile) -> File | None:
        """The file as the manifest has it, or None if it is not what the hub has."""
        size = path.stat().st_size
        if size != remote.size_bytes:
            return None
        file = File(path=remote.path, size_bytes=size, sha256=sha256(path))
        return file if is_the_hubs(path, file, remote) else None


class _Part(io.FileIO):
    """A file that is being written: it moves the progress bar, and ends when the download is to stop."""

    def __init__(self, path: Path, bar: tqdm[None], stop: threading.Event) -> None:
        super().__init__(path, "a+")
        self._bar = bar
        self._stop = stop

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        if self._stop.is_set():
            raise BuilderError("stopped, as another file cannot be had")
        rest = memoryview(data)
        while rest:
            written = super().write(rest)
            self._bar.update(written)
            rest = rest[written:]
        return len(data)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory against other processes; say so when that means waiting."""
    # Not the file that stands in for a lock where there are none: it outlives a process that is killed.
    lock = FileLock(directory / LOCK, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"another process is downloading to {directory}: waiting for it")
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _say(f"the disk of {directory} has no locks: let one process at a time download to it (hashes tell)")
    try:
        yield
    finally:
        lock.release()


def _say(text: str) -> None:
    sys.stderr.write(f"builder: {text}\n")
    sys.stderr.flush()
