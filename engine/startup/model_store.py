"""Where a model of the hub may lie on this machine, and how it gets there if it does not.

`python -m builder download` writes a manifest last, so a directory of ours with a manifest is whole. A cache of the
hub's client has no such mark; there configuration, tokenizer and all shards of one set of weights have to be there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import layout
from engine.child_processes import set_parent_death_signal
from engine.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAIN = "main"
_TAIL_BYTES = 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    """What a directory holds, by its manifest: a model of the hub, or one from elsewhere."""

    repository: str | None
    revision: str | None
    commit: str | None

    def is_it(self, name: str, revision: str | None) -> bool:
        """Whether it is this model; without a revision, at any commit."""
        same = self.repository is not None and self.repository.lower() == name.lower()
        return same and revision in (None, self.revision, self.commit)


def is_dir(path: str | Path) -> bool:
    """Whether there is a directory that this user may see."""
    return os.path.isdir(path)  # noqa: PTH112 (`Path.is_dir` raises where the user may not look)


def held(directory: Path) -> Held | None:
    """What the directory holds, or None if no whole model lies there.

    Raises:
        ConfigurationError: its manifest cannot be read.
    """
    file = directory / layout.MANIFEST
    try:
        if not file.is_file():
            return None
    except OSError as error:
        _warn_unreadable(directory, error)
        return None
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        return Held(manifest["repository"], manifest["revision"], manifest["commit"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigurationError(f"{file} cannot be read: build the image anew, or download the model anew") from None


def in_cache(cache: Path, name: str, revision: str | None) -> Path | None:
    """Where a cache of the hub's client has the whole model, if it has it.

    Args:
        cache: holds `models--ORG--NAME/snapshots/COMMIT`; names are compared without case, as platforms write theirs.
        name: of the repository.
        revision: branch, tag or commit.
    """
    wanted = "models--" + name.replace("/", "--").lower()
    try:
        entries = sorted(cache.iterdir()) if cache.is_dir() else []
        for repository in (entry for entry in entries if entry.name.lower() == wanted):
            for commit in _commits(repository, revision):
                snapshot = repository / "snapshots" / commit
                if layout.is_complete(snapshot):
                    return snapshot
    except OSError as error:
        _warn_unreadable(cache, error)
    return None


def _warn_unreadable(directory: Path, error: OSError) -> None:
    _log.warning("%s is not looked into, as user %d may not read it: %s", directory, os.getuid(), error.strerror)


def ours(models: Path, name: str, revision: str | None) -> Path:
    """The directory that a download of this model is for, within a directory of models."""
    return models / name.replace("/", "--").lower() / (revision or _MAIN).replace("/", "--")


def download(name: str, directory: Path, revision: str | None) -> None:
    """Load the model into the directory, in a process of the builder; what it says is passed on.

    Raises:
        ConfigurationError: it cannot be had; the message is the builder's.
    """
    command = [sys.executable, "-m", "builder", "download", name, str(directory)]
    if revision:
        command += ["--revision", revision]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=set_parent_death_signal,  # noqa: PLW1509 (no other thread runs that early)
    ) as process:
        tail = b""
        try:
            for chunk in _chunks(process):
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()
                tail = (tail + chunk)[-_TAIL_BYTES:]
        except BaseException:  # A signal has been sent: leaving the block waits for the process to end.
            process.kill()
            raise
    if process.returncode:
        raise ConfigurationError(
            _why(name, process.returncode, tail.decode(errors="replace")) + _who_may_not(directory)
        )


def _why(name: str, status: int, said: str) -> str:
    """Why a download ended: the builder's own last words, if they are its last; progress and tracebacks are none."""
    ended = f"the download of {name} ended with {status}"
    if status < 0:
        hint = ": out of memory?" if -status == signal.SIGKILL else ""
        return f"{ended} (killed by {signal.Signals(-status).name}{hint})"
    before, marked, told = ("\n" + re.sub(r"\r+", "\n", said)).rpartition("\nbuilder: ")
    lines = [line.strip() for line in (told or before).splitlines() if line.strip()]
    if marked and not any(line.startswith("Traceback") for line in lines):
        return "; ".join(lines)
    return f"{ended}: {lines[-1]}" if lines else ended


def _who_may_not(directory: Path) -> str:
    """What to do where the worker's user may not write to the volume."""
    place = next(path for path in (directory, *directory.absolute().parents) if os.access(path, os.F_OK))
    if os.access(place, os.W_OK):
        return ""
    return (
        f". The worker runs as user {os.getuid()}, who may not write to {place}: build the image with WORKER=0, "
        "or change the volume's owner"
    )


def _chunks(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    while process.stderr is not None and (chunk := process.stderr.read1()):  # type: ignore[attr-defined]
        yield chunk


def _commits(repository: Path, revision: str | None) -> list[str]:
    """What the revision may mean in this cache, the likeliest first."""
    if revision and _COMMIT.fullmatch(revision):
        return [revision]
    reference = repository / "refs" / (revision or _MAIN)
    if reference.is_file():
        return [reference.read_text(encoding="utf-8").strip()]
    # A platform that fetched the model itself may have written no references; then there is one snapshot.
    snapshots = sorted(entry.name for entry in (repository / "snapshots").glob("*"))
    return snapshots if revision is None and len(snapshots) == 1 else []
