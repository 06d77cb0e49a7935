"""Where a model of the hub may lie on this machine, and how it gets there if it does not.

`python -m builder download` writes a manifest last, so a directory of ours with a manifest is whole. A cache of the
hub's client has no such mark; there the files that the weights' index names have to be there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.children import end_with_parent
from engine.errors import ConfigurationError

ROOT = Path(__file__).resolve().parent.parent
_MANIFEST = "model-manifest.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAIN = "main"
_TAIL_BYTES = 4096


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


def held(directory: Path) -> Held | None:
    """What the directory holds, or None if no whole model lies there.

    Raises:
        ConfigurationError: its manifest cannot be read.
    """
    file = directory / _MANIFEST
    if not file.is_file():
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
    entries = sorted(cache.iterdir()) if cache.is_dir() else []
    for repository in (entry for entry in entries if entry.name.lower() == wanted):
        for commit in _commits(repository, revision):
            snapshot = repository / "snapshots" / commit
            if _is_whole(snapshot):
                return snapshot
    return None


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
        preexec_fn=end_with_parent,  # noqa: PLW1509 (no other thread runs that early)
    ) as process:
        tail = b""
        for chunk in _chunks(process):
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()
            tail = (tail + chunk)[-_TAIL_BYTES:]
    if process.returncode:
        lines = re.split(r"[\r\n]+", tail.decode(errors="replace").strip())
        raise ConfigurationError(lines[-1].removeprefix("builder: ") or f"{name} could not be downloaded")


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


def _is_whole(snapshot: Path) -> bool:
    """Whether all that the weights' index names is there, or weights without an index are."""
    if not any((snapshot / name).is_file() for name in ("config.json", "params.json")):
        return False
    indexes = list(snapshot.glob("*.index.json"))
    try:
        shards = {shard for index in indexes for shard in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError):
        return False
    if shards:
        return all((snapshot / shard).is_file() for shard in shards)
    return any(path.is_file() for kind in ("*.safetensors", "*.bin", "*.pt", "*.pth") for path in snapshot.glob(kind))
