"""Finds models of the hub on this machine, and downloads them.

A directory that `python -m builder download` has filled is complete if it has a manifest, which is written last. A
snapshot in a cache of the hub's client has none: it is complete if it has the configuration, the tokenizer and all
shards of one set of weights.
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
_DEFAULT_REVISION = "main"
_TAIL_BYTES = 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ManifestInfo:
    """The model of a directory, from its manifest; without a repository, it is not from the hub."""

    repository: str | None
    revision: str | None
    commit: str | None

    def matches(self, name: str, revision: str | None) -> bool:
        """Return whether it is this model at this revision; None matches any."""
        is_same = self.repository is not None and self.repository.lower() == name.lower()
        return is_same and revision in (None, self.revision, self.commit)


def is_dir(path: str | Path) -> bool:
    """Return whether the directory exists and this user may access it."""
    return os.path.isdir(path)  # noqa: PTH112 (`Path.is_dir` raises PermissionError)


def read_manifest(directory: Path) -> ManifestInfo | None:
    """Return which model is in the directory, or None if there is no complete one.

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
        return ManifestInfo(manifest["repository"], manifest["revision"], manifest["commit"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigurationError(f"{file} cannot be read: rebuild the image, or download the model again") from None


def find_in_cache(cache: Path, name: str, revision: str | None) -> Path | None:
    """Return the directory of the complete model in a cache of the hub's client, or None.

    Args:
        cache: has `models--ORG--NAME/snapshots/COMMIT`. Names are compared without case: platforms write lower case.
        name: of the repository.
        revision: branch, tag or commit.
    """
    wanted = "models--" + name.replace("/", "--").lower()
    try:
        entries = sorted(cache.iterdir()) if cache.is_dir() else []
        for repository in (entry for entry in entries if entry.name.lower() == wanted):
            for commit in _candidate_commits(repository, revision):
                snapshot = repository / "snapshots" / commit
                if layout.is_complete(snapshot):
                    return snapshot
    except OSError as error:
        _warn_unreadable(cache, error)
    return None


def _warn_unreadable(directory: Path, error: OSError) -> None:
    _log.warning("Skipping %s: user %d may not read it: %s", directory, os.getuid(), error.strerror)


def download_dir(models: Path, name: str, revision: str | None) -> Path:
    """Return the directory of this model within a directory of downloaded models."""
    return models / name.replace("/", "--").lower() / (revision or _DEFAULT_REVISION).replace("/", "--")


def download(name: str, directory: Path, revision: str | None) -> None:
    """Download the model into the directory, in a process of the builder; its output goes to stderr.

    Raises:
        ConfigurationError: the download failed; the message is the builder's.
    """
    command = [sys.executable, "-m", "builder", "download", name, str(directory)]
    if revision:
        command += ["--revision", revision]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=set_parent_death_signal,  # noqa: PLW1509 (no thread that runs that early imports anything)
    ) as process:
        tail = b""
        try:
            for chunk in _read_stderr(process):
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()
                tail = (tail + chunk)[-_TAIL_BYTES:]
        except BaseException:  # Such as the SystemExit of a signal: the block would wait for the process.
            process.kill()
            raise
    if process.returncode:
        reason = _failure_reason(name, process.returncode, tail.decode(errors="replace"))
        raise ConfigurationError(reason + _write_hint(directory))


def _failure_reason(name: str, status: int, output: str) -> str:
    """Return why a download failed: the builder's last message, unless progress or a traceback follows it."""
    ended = f"the download of {name} ended with {status}"
    if status < 0:
        hint = ": out of memory?" if -status == signal.SIGKILL else ""
        return f"{ended} (killed by {signal.Signals(-status).name}{hint})"
    before, prefix, message = ("\n" + re.sub(r"\r+", "\n", output)).rpartition("\nbuilder: ")
    lines = [line.strip() for line in (message or before).splitlines() if line.strip()]
    if prefix and not any(line.startswith("Traceback") for line in lines):
        return "; ".join(lines)
    return f"{ended}: {lines[-1]}" if lines else ended


def _write_hint(directory: Path) -> str:
    """Return what to do if the worker's user may not write to the directory; an empty text if it may."""
    existing = next(path for path in (directory, *directory.absolute().parents) if os.access(path, os.F_OK))
    if os.access(existing, os.W_OK):
        return ""
    return (
        f". The worker runs as user {os.getuid()}, which may not write to {existing}: build the image with WORKER=0, "
        "or change the volume's owner"
    )


def _read_stderr(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    while process.stderr is not None and (chunk := process.stderr.read1()):  # type: ignore[attr-defined]
        yield chunk


def _candidate_commits(repository: Path, revision: str | None) -> list[str]:
    """Return the commits that the revision may stand for in this cache."""
    if revision and _COMMIT.fullmatch(revision):
        return [revision]
    reference = repository / "refs" / (revision or _DEFAULT_REVISION)
    if reference.is_file():
        return [reference.read_text(encoding="utf-8").strip()]
    # A platform's own download may have no refs. A single snapshot is then the default revision.
    snapshots = sorted(entry.name for entry in (repository / "snapshots").glob("*"))
    return snapshots if revision is None and len(snapshots) == 1 else []
