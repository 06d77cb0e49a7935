"""Compiled code in one file: whatever happens to those who write it, what readers find is whole."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from builder import cache_file
from builder.__main__ import main
from builder.errors import DiskSpaceError, IntegrityError

ROOT = Path(__file__).parents[3]
LARGE_BYTES = 3 << 30


def content(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(text)
    return directory


def unpacked(file: Path, directory: Path) -> dict[str, bytes]:
    cache_file.unpack(file, directory)
    return content(directory)


def wait_for(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def packing(directory: Path, file: Path, *arguments: str, stdin: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "builder", "pack", str(directory), str(file), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdin=stdin)


def test_what_is_packed_is_unpacked_with_its_times_and_rights(tmp_path: Path) -> None:
    """ninja, for one, compares times; compiled launchers are executable."""
    source = write(tmp_path / "source", {"a/kernel.so": b"code" * 1000, "b": b""})
    (source / "a/kernel.so").chmod(0o755)
    os.utime(source / "a/kernel.so", (1_000_000_000, 1_000_000_000.5))

    assert cache_file.pack(source, tmp_path / "file.tar") == 2
    assert cache_file.unpack(tmp_path / "file.tar", tmp_path / "target") == (2, 4000)

    assert content(tmp_path / "target") == content(source)
    stat = (tmp_path / "target/a/kernel.so").stat()
    assert (stat.st_mode & 0o777, stat.st_mtime) == (0o755, 1_000_000_000.5)


def test_what_is_there_already_is_not_unpacked_again(tmp_path: Path) -> None:
    cache_file.pack(write(tmp_path / "source", {"a": b"packed", "b": b"packed"}), tmp_path / "file.tar")
    target = write(tmp_path / "target", {"a": b"here"})

    assert cache_file.unpack(tmp_path / "file.tar", target) == (1, 6)
    assert content(target) == {"a": b"here", "b": b"packed"}


def test_what_other_workers_have_packed_stays(tmp_path: Path) -> None:
    cache_file.pack(write(tmp_path / "one", {"a": b"1", "both": b"1"}), tmp_path / "file.tar")

    cache_file.pack(write(tmp_path / "two", {"b": b"2", "both": b"2"}), tmp_path / "file.tar")

    assert unpacked(tmp_path / "file.tar", tmp_path / "target") == {"a": b"1", "b": b"2", "both": b"2"}


def test_without_news_the_file_is_not_written(tmp_path: Path) -> None:
    source, file = write(tmp_path / "source", {"a": b"1", "b": b"2"}), tmp_path / "file.tar"
    cache_file.pack(source, file)
    before = file.stat()

    assert cache_file.pack(source, file, ["a", "a file that is gone"]) == 0
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_worker_that_is_killed_while_it_packs_leaves_the_old_file(tmp_path: Path) -> None:
    """What it leaves is removed an hour later, when no other worker can still be writing it."""
    source, file = write(tmp_path / "source", {"a": b"old"}), tmp_path / "volume/file.tar"
    cache_file.pack(source, file)
    with (source / "large").open("wb") as large:
        large.truncate(LARGE_BYTES)

    process = packing(source, file)
    wait_for(lambda: [one for one in file.parent.glob(".*.partial") if one.stat().st_size])
    process.send_signal(signal.SIGKILL)

    assert process.wait(30) == -signal.SIGKILL
    assert unpacked(file, tmp_path / "target") == {"a": b"old"}
    (partial,) = file.parent.glob(".*.partial")
    os.utime(partial, (time.time() - 7200,) * 2)
    assert cache_file.pack(write(source, {"b": b"new"}), file, ["b"]) == 1
    assert not partial.exists()
    assert unpacked(file, tmp_path / "target") == {"a": b"old", "b": b"new"}


def test_two_workers_that_pack_at_once_lose_nothing(tmp_path: Path) -> None:
    names = {worker: [f"{worker}/{number}" for number in range(200)] for worker in "ab"}
    source = write(tmp_path / "source", {name: name.encode() for one in names.values() for name in one})
    processes = []
    for worker, one in names.items():
        (tmp_path / worker).write_text("\n".join(one))
        with (tmp_path / worker).open("rb") as stdin:
            processes.append(packing(source, tmp_path / "file.tar", "--stdin", stdin=stdin))

    assert [process.wait(60) for process in processes] == [0, 0]
    assert unpacked(tmp_path / "file.tar", tmp_path / "target") == content(source)


@pytest.mark.parametrize("damage", ["truncated", "no archive", "empty"])
def test_a_damaged_file_is_reported_and_then_written_anew(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, file = write(tmp_path / "source", {"a": b"a" * 5000, "b": b"b" * 50_000}), tmp_path / "file.tar"
    cache_file.pack(source, file)
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[:20_000], "no archive": b"x" * 20_000, "empty": b""}[damage])

    assert main(["unpack", str(file), str(tmp_path / "target")]) == 4
    assert f"{file} is damaged" in capsys.readouterr().err
    assert set(content(tmp_path / "target").items()) <= set(content(source).items())

    cache_file.pack(source, file)
    assert unpacked(file, tmp_path / "target") == content(source)


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_file_with_paths_out_of_its_directory_is_refused(name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "file.tar", "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))

    with pytest.raises(IntegrityError, match="outside of its directory"):
        cache_file.unpack(tmp_path / "file.tar", tmp_path / "a/target")
    assert content(tmp_path / "a") == {}


def test_links_are_not_unpacked(tmp_path: Path) -> None:
    """A link could lead the next file out of the directory."""
    with tarfile.open(tmp_path / "file.tar", "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)

    assert unpacked(tmp_path / "file.tar", tmp_path / "target") == {}


def test_a_full_file_starts_anew_with_what_was_just_compiled(tmp_path: Path) -> None:
    source, file = write(tmp_path / "source", {"old": b"x" * 60, "new": b"y" * 60}), tmp_path / "file.tar"
    cache_file.pack(source, file, ["old"], max_bytes=100)

    cache_file.pack(source, file, ["new"], max_bytes=100)

    assert unpacked(file, tmp_path / "target") == {"new": b"y" * 60}
    write(source, {"large": b"z" * 101})
    with pytest.raises(DiskSpaceError, match="too much"):
        cache_file.pack(source, file, max_bytes=100)
    assert unpacked(file, tmp_path / "target") == {"new": b"y" * 60}


def disk_with(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    """Have the system report so much free space."""

    class Usage:
        free = free_bytes

    def disk_usage(_path: Path) -> type[Usage]:
        return Usage

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)


def test_nothing_is_unpacked_onto_a_disk_that_would_be_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The libraries' own next files would fail, and with them the start."""
    source, file, target = write(tmp_path / "source", {"a": b"a" * 5000}), tmp_path / "file.tar", tmp_path / "target"
    cache_file.pack(source, file)

    disk_with(monkeypatch, cache_file.RESERVE_BYTES + 5000)
    assert main(["unpack", str(file), str(target)]) == DiskSpaceError.exit_code
    assert f"unpacking {file} needs" in capsys.readouterr().err
    assert content(target) == {}

    disk_with(monkeypatch, cache_file.RESERVE_BYTES + file.stat().st_size)
    assert unpacked(file, target) == content(source)
    disk_with(monkeypatch, 0)
    assert cache_file.unpack(file, target) == (0, 0), "all is there already"


def test_what_was_unpacked_onto_a_disk_that_is_full_is_deleted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, file = write(tmp_path / "source", {"a": b"1", "b": b"2", "c": b"3"}), tmp_path / "file.tar"
    cache_file.pack(source, file)
    target = write(tmp_path / "target", {"a": b"here before"})
    copy = shutil.copyfileobj

    def copy_until_full(content: IO[bytes], opened: IO[bytes], length: int) -> None:
        copy(content, opened, length)
        if Path(f"/proc/self/fd/{opened.fileno()}").readlink().name.startswith(".c."):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", copy_until_full)

    with pytest.raises(OSError, match="No space left"):
        cache_file.unpack(file, target)
    assert content(target) == {"a": b"here before"}


def test_what_a_killed_unpacking_has_left_is_not_packed_and_then_removed(tmp_path: Path) -> None:
    """Not while another process may still be writing it."""
    directory = write(tmp_path / "source", {"a": b"1", "b/.kernel.abcdefgh.partial": b"2"})
    (partial,) = directory.rglob("*.partial")

    assert cache_file.pack(directory, tmp_path / "file.tar") == 1
    cache_file.unpack(tmp_path / "file.tar", directory)
    assert partial.exists()
    os.utime(partial, (time.time() - 7200,) * 2)
    cache_file.unpack(tmp_path / "file.tar", directory)
    assert not partial.exists()
