"""What a run has done, on disk: the output file, the errors file, and a journal beside them.

    OUT.jsonl           answers, a line each
    OUT.errors.jsonl    lines that failed; made with the first
    OUT.jsonl.journal   {"version", "input_sha256", "endpoint", "errors"}, then {"custom_id", "job"} for each job sent

A line of the output or errors file is the record that its request is answered; a job in the journal whose request is
not answered is to be collected. Each record is a line written at the file's end at once, so a process that is killed
leaves at most a torn last line, which is cut off at the next start. `sync` makes the records durable: after a power
failure, what was not synced is collected or sent again.

The journal is cut to its first line when every line is answered, so that the answers of one input are never taken for
those of another. It is removed when a run ends before it has sent a job.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from batch.errors import JournalError

_VERSION: Final = 1


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    input_sha256: str
    endpoint: str
    errors: str


class _Sent(msgspec.Struct):
    custom_id: str
    job: str


class _Answer(msgspec.Struct):
    custom_id: str


_Record = TypeVar("_Record", _Header, _Sent, _Answer)


class Journal:
    """A run's files, from `open` to `close`.

    Args:
        output: path of the output file; the journal is beside it.
        errors: path of the errors file.

    Attributes:
        path: of the journal itself.
        answered: the requests that are answered, by `custom_id`.
        failed: how many of them are in the errors file.
        jobs: the id of the last job of each request that was sent.
    """

    def __init__(self, output: Path, errors: Path) -> None:
        self.answered: set[str] = set()
        self.failed = 0
        self.jobs: dict[str, str] = {}
        self.path = output.with_name(f"{output.name}.journal")
        self._journal = _AppendedFile(self.path)
        self._output, self._errors = _AppendedFile(output), _AppendedFile(errors)
        self._errors_name = os.path.relpath(errors.resolve(), output.resolve().parent)

    def open(self, custom_ids: Iterable[str], input_sha256: str, endpoint: str) -> None:
        """Begin a run, or continue it.

        Args:
            custom_ids: those of the input's requests.
            input_sha256: hash of the input.
            endpoint: URL of the endpoint that jobs are sent to.

        Raises:
            JournalError: the files are of another run, damaged, or in use.
            OSError: they cannot be read or written.
        """
        try:
            self._open(set(custom_ids), _Header(_VERSION, input_sha256, endpoint, self._errors_name))
        except BaseException:
            self._close_files()
            raise

    def sent(self, custom_id: str, job: str) -> None:
        """Record that a job was sent for a request."""
        self._journal.append(_Sent(custom_id, job))
        self.jobs[custom_id] = job

    def answer(self, custom_id: str, document: dict[str, Any], *, failed: bool) -> None:
        """Write the answer to a request into the output file or, if it failed, into the errors file."""
        (self._errors if failed else self._output).append(document)
        self.answered.add(custom_id)
        self.failed += failed

    def sync(self) -> None:
        """Make everything durable that was written."""
        for file in (self._output, self._errors, self._journal):
            file.sync()

    def close(self, *, complete: bool = False) -> None:
        """Close the files; keep the journal's first line if every request is answered, none if nothing was sent."""
        try:
            self.sync()
            if complete:
                self._journal.keep_first_line()
            elif not (self.jobs or self.answered):
                self.path.unlink(missing_ok=True)
            if complete and not self.failed:  # it may have had the torn line of a request that was answered later
                self._errors.path.unlink(missing_ok=True)
        finally:
            self._close_files()

    def _close_files(self) -> None:
        for file in (self._output, self._errors, self._journal):
            file.close()

    def _open(self, expected: set[str], header: _Header) -> None:
        for file in (self._output, self._errors):
            if not file.path.parent.is_dir():
                raise JournalError(f"{file.path.parent} is not a directory: create it, or name another")
        existing = [file for file in (self._output, self._errors) if file.path.exists()]
        begun = False
        if not existing or self._journal.path.exists():
            self._journal.open()
            begun = self._read_journal(header)
        if existing and not begun:
            raise JournalError(f"{existing[0].path} exists already: remove it, or name another output")
        if not begun:
            self._journal.append(header)
            self._journal.sync()
        for file in (self._output, self._errors):
            if file.path.exists():
                file.open()
        self._read_answers(expected)

    def _read_journal(self, header: _Header) -> bool:
        """Read the jobs that were sent; return whether the journal has begun, as its first line is complete.

        Raises:
            JournalError: it is of another run, or damaged.
        """
        path = self._journal.path
        lines = self._journal.lines()
        first = next(lines, None)
        if first is None:
            return False
        found = _decode(first, _Header, path, 1)
        if found.version != header.version:
            raise JournalError(f"{path} was written by another version of this program: finish the run with that")
        if found.input_sha256 != header.input_sha256:
            raise JournalError(
                f"{path} is of another input file, or the input has changed: name another output, or "
                f"remove this one, {self._output.path} and {self._errors.path}"
            )
        if found.endpoint != header.endpoint:
            raise JournalError(f"{path} is of the endpoint {found.endpoint}: continue there, or name another output")
        if found.errors != header.errors:
            raise JournalError(f"{path} is of a run whose errors file is {found.errors}: name it with --errors")
        for number, line in enumerate(lines, 2):
            record = _decode(line, _Sent, path, number)
            self.jobs[record.custom_id] = record.job
        return True

    def _read_answers(self, expected: set[str]) -> None:
        """Read which requests are answered.

        Raises:
            JournalError: the files have other lines than a run of this input writes.
        """
        count = 0
        for file in (self._output, self._errors):
            for number, line in enumerate(file.lines(), 1):
                self.answered.add(_decode(line, _Answer, file.path, number).custom_id)
                self.failed += file is self._errors
                count += 1
        if len(self.answered) != count or not self.answered <= expected:
            raise JournalError(
                f"{self._output.path} or {self._errors.path} has lines that this run has not written: restore them, or "
                f"remove both and {self._journal.path} to begin again"
            )


class _AppendedFile:
    """A file of JSON lines that grows at its end; one process writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._synced = True

    def lines(self) -> Iterator[bytes]:
        """Yield the complete lines; none if there is no such file."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line

    def open(self) -> int:
        """Open the file for `append`, and cut off a torn last line; create it if there is none.

        Raises:
            JournalError: another process has it open.
        """
        if self._descriptor is not None:
            return self._descriptor
        new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise JournalError(f"{self.path} is in use: another process runs this batch") from None
        if size := os.fstat(descriptor).st_size:
            with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as content:
                complete = content.rfind(b"\n") + 1
            os.ftruncate(descriptor, complete)
        if new:
            _sync_directory(self.path.parent)
        self._descriptor = descriptor
        return descriptor

    def append(self, record: Any) -> None:
        """Write a line.

        Raises:
            OSError: it cannot be written, as when the disk is full; nothing of it stays in the file.
        """
        descriptor = self.open()
        rest = memoryview(_encode(record) + b"\n")
        size = os.fstat(descriptor).st_size
        self._synced = False
        try:
            with self._named_errors():
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise

    def keep_first_line(self) -> None:
        """Remove all lines but the first."""
        os.ftruncate(self.open(), len(next(self.lines())))

    def sync(self) -> None:
        """Make the lines durable."""
        if self._descriptor is not None and not self._synced:
            with self._named_errors():
                os.fsync(self._descriptor)
            self._synced = True

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Add the file's name to errors of its descriptor."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _encode(record: Any) -> bytes:
    try:
        return msgspec.json.encode(record)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON has only as an escape
        return json.dumps(record).encode()


def _decode(line: bytes, kind: type[_Record], path: Path, number: int) -> _Record:
    try:
        return msgspec.convert(json.loads(line), kind)
    except (ValueError, msgspec.ValidationError) as error:
        raise JournalError(f"{path}:{number} is not a line of a batch's run: {error}") from None


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
