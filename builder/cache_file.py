"""The `pack` and `unpack` commands: compiled code as one file, for disks on which many small files are slow.

The file is a tar archive, not compressed. It is written under another name and renamed when it is complete, so a reader
never sees half of it, and a process that is killed leaves the old one. Standard library only, and no vLLM: a worker
runs both commands at each start.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from builder.console import log
from builder.errors import DiskSpaceError, IntegrityError
from builder.layout import PARTIAL, is_compiled_code
from builder.process_lock import process_lock

MAX_BYTES = 4 << 30
# What unpacking leaves free, for the libraries' next files.
RESERVE_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 20
# A partial file that is older was left by a process that was killed.
_LEFTOVER_S = 3600


def pack(directory: Path, file: Path, names: Iterable[str] | None = None, max_bytes: int = MAX_BYTES) -> int:
    """Add files of a directory to an archive, or make it. Other workers may do the same at the same time.

    What the archive has already stays, unless it would become larger than `max_bytes`: then it starts anew.

    Args:
        directory: the files are below it.
        file: the archive.
        names: paths of the files relative to the directory; by default, those of `files_below`.
        max_bytes: maximum size of all packed files.

    Returns:
        The number of files added; 0 if the archive has all of them, and is left as it is.

    Raises:
        DiskSpaceError: the files to add are larger than `max_bytes`.
        OSError: the archive cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with process_lock(file.with_name(f"{file.name}.lock"), f"packing {file}"), _open_existing(file) as old:
        kept = {} if old is None else {member.name: member for member in old.getmembers() if member.isreg()}
        added = {}
        for name in files_below(directory) if names is None else names:
            with suppress(OSError):  # A temporary file, which is gone by now.
                path = directory / name
                if name not in kept or old is None or not _is_same(path, old, kept[name]):
                    added[name] = path.stat().st_size
        if not added:
            return 0
        if sum(added.values()) > max_bytes:
            raise DiskSpaceError(f"{sum(added.values()):,} bytes are too much for {file}: it may have {max_bytes:,}")
        kept = {name: member for name, member in kept.items() if name not in added}
        if sum(added.values()) + sum(member.size for member in kept.values()) > max_bytes:
            log(f"{file} is full ({max_bytes:,} bytes): starting it anew")
            kept = {}
        _remove_leftovers(file.parent.glob(f".{file.name}.*{PARTIAL}"))
        with _replacing(file) as opened, tarfile.open(fileobj=opened, mode="w", dereference=True) as new:
            for member in kept.values():
                new.addfile(member, old.extractfile(member) if old is not None else None)
            for name in added:
                with suppress(FileNotFoundError), (directory / name).open("rb") as content:
                    info = new.gettarinfo(arcname=name, fileobj=content)
                    info.uid, info.gid, info.uname, info.gname = 0, 0, "", ""
                    new.addfile(info, content)
        return len(added)


def unpack(file: Path, directory: Path) -> tuple[int, int]:
    """Unpack the files that are not in the directory yet; each has its name only when it is complete.

    Returns:
        The number of files unpacked, and their size in bytes.

    Raises:
        DiskSpaceError: the directory has no space for the archive and `RESERVE_BYTES`; nothing is unpacked.
        IntegrityError: the archive is damaged; the files before the damage are unpacked.
        OSError: it cannot be read, or the directory not be written; what was unpacked is deleted again.
    """
    unpacked: list[Path] = []
    size_bytes = 0
    _remove_leftovers(directory.rglob(f".*{PARTIAL}"))
    try:
        # Not tarfile's streams: they copy the rest of their buffer at each read.
        with file.open("rb", _BUFFER_BYTES) as opened_file, tarfile.open(fileobj=opened_file, mode="r:") as archive:
            for member in archive:
                target = directory / member.name
                if not _is_inside(member.name):
                    raise IntegrityError(f"{file} has a file outside of its directory: {member.name!r}. Delete it")
                content = archive.extractfile(member) if member.isreg() else None
                if content is None or target.exists():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                if not unpacked:
                    _check_space(file, directory)
                with _replacing(target, synced=False) as opened:
                    shutil.copyfileobj(content, opened, _BUFFER_BYTES)
                    os.fchmod(opened.fileno(), member.mode & 0o777 | 0o600)
                unpacked.append(target)
                # Build tools compare times, and the worker knows by them what is new.
                os.utime(target, (member.mtime, member.mtime))
                size_bytes += member.size
    except tarfile.TarError as error:
        raise IntegrityError(f"{file} is damaged ({error}): it is written anew after the next compilation") from error
    except OSError:
        for path in unpacked:
            path.unlink(missing_ok=True)
        raise
    return len(unpacked), size_bytes


def files_below(directory: Path) -> Iterator[str]:
    """Yield the paths of the files that may be packed, relative to the directory."""
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if is_compiled_code(name) and path.is_file():
            yield name


def _check_space(file: Path, directory: Path) -> None:
    needed_bytes, free_bytes = file.stat().st_size + RESERVE_BYTES, shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise DiskSpaceError(f"{directory} has {free_bytes:,} bytes free; unpacking {file} needs {needed_bytes:,}")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


@contextmanager
def _open_existing(file: Path) -> Iterator[tarfile.TarFile | None]:
    """Open an archive; None if there is none, or it is damaged."""
    with ExitStack() as stack:
        archive: tarfile.TarFile | None = None
        try:
            archive = stack.enter_context(tarfile.open(fileobj=stack.enter_context(file.open("rb")), mode="r:"))
            archive.getmembers()
        except FileNotFoundError:
            pass
        except tarfile.TarError as error:
            log(f"{file} is damaged ({error}): writing it anew")
            archive = None
        yield archive


def _is_same(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    packed = archive.extractfile(member)
    if packed is None or path.stat().st_size != member.size:
        return False
    with path.open("rb") as content:
        while chunk := content.read(_BUFFER_BYTES):
            if chunk != packed.read(len(chunk)):
                return False
    return True


@contextmanager
def _replacing(file: Path, *, synced: bool = True) -> Iterator[IO[bytes]]:
    """Open a new file that gets its name at the end of the block, if that has no error."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{file.name[:100]}.", suffix=PARTIAL, dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            yield opened
            opened.flush()
            if synced:
                os.fchmod(opened.fileno(), 0o644)
                os.fsync(opened.fileno())
        os.replace(partial, file)  # noqa: PTH105 (mkstemp returns a text)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)  # noqa: PTH108
        raise


def _remove_leftovers(partial_files: Iterable[Path]) -> None:
    for path in partial_files:
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_S:
                path.unlink()
