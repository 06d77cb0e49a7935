"""The Dockerfile's packages on a base image with and without vLLM: its own step, on a Python of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

DOCKERFILE = (Path(__file__).parents[2] / "Dockerfile").read_text(encoding="utf-8")
LOCKS = {"gpu": {"torch": "2.13.0", "vllm": "0.32.0", "same": "1.0"}, "worker": {"runpod": "1.12.0"}}


def _wheel(directory: Path, name: str, version: str) -> Path:
    """Make the wheel of a package that knows its version."""
    wheel = directory / f"{name}-{version}-py3-none-any.whl"
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        file.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{information}/RECORD", "")
    return wheel


def _python(path: str, program: str) -> str:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec python3 -c "$0"', program],
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


class Base:
    """A base image's Python, and the step of the Dockerfile that installs into it."""

    def __init__(self, directory: Path, packages: dict[str, str]) -> None:
        self.directory = directory
        self.wheels = directory / "wheels"
        self.wheels.mkdir()
        python = directory / "base"
        subprocess.run([sys.executable, "-m", "venv", str(python)], check=True)
        installed = [str(_wheel(self.wheels, name, version)) for name, version in packages.items()]
        pip = [str(python / "bin" / "python3"), "-m", "pip", "install", "--quiet", "--no-deps", *installed]
        subprocess.run(pip, check=True, env=self._environment(os.environ["PATH"]))
        (directory / "requirements").mkdir()
        for lock, pins in LOCKS.items():
            for name, version in pins.items():
                _wheel(self.wheels, name, version)
            lines = "".join(f"{name}=={version}\n" for name, version in pins.items())
            (directory / "requirements" / f"{lock}.lock").write_text(lines, encoding="utf-8")
        path = re.search(r"^ENV PATH=(/opt/packages/bin):\$\{PATH\}$", DOCKERFILE, re.MULTILINE)
        assert path
        self.path = f"{directory}{path[1]}:{python / 'bin'}:/usr/bin:/bin"

    def _environment(self, path: str) -> dict[str, str]:
        return {"PATH": path, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}

    def install(self) -> None:
        """Run the step."""
        step = re.search(r"^RUN --mount\S+ \\\n +(if python3 .*?)(?<!\\)$", DOCKERFILE, re.MULTILINE | re.DOTALL)
        assert step
        command = step[1].replace("/opt/packages", f"{self.directory}/opt/packages")
        environment = self._environment(self.path)
        done = subprocess.run(
            ["/bin/sh", "-c", command], cwd=self.directory, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def versions(self, names: Iterable[str]) -> dict[str, str]:
        """Return the versions of these modules that `python3` of the image imports; those that it has."""
        program = (
            "import importlib, importlib.util as util, sys\n"
            f"found = [name for name in {list(names)} if util.find_spec(name)]\n"
            "print(*(f'{name}={importlib.import_module(name).__version__}' for name in found))"
        )
        return dict(pair.split("=") for pair in _python(self.path, program).split())


def test_the_locks_torch_wins_over_the_bases_and_what_is_built_for_that_is_not_seen(tmp_path: Path) -> None:
    """Such as xformers, which fails beside another torch.

    What the base has in the lock's version is installed all the same: the base's copy is not seen.
    """
    base = Base(tmp_path, {"torch": "2.5.1", "xformers": "0.0.28", "same": "1.0"})
    assert base.versions(["torch", "xformers"]) == {"torch": "2.5.1", "xformers": "0.0.28"}
    base.install()
    assert base.versions(["torch", "xformers", "vllm", "same", "pip"]) == {**LOCKS["gpu"]}


@pytest.mark.parametrize("torch", ["2.13.0", "2.11.0"])
def test_the_packages_of_a_base_with_vllm_are_not_changed(torch: str, tmp_path: Path) -> None:
    base = Base(tmp_path, {"torch": torch, "vllm": "0.32.0"})
    base.install()
    assert base.versions(["torch", "vllm", "runpod", "same"]) == {"torch": torch, "vllm": "0.32.0", "runpod": "1.12.0"}
    assert not (tmp_path / "opt").exists()
