"""The built wheel holds all that a worker needs, and its commands work away from this repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (built,) = directory.glob("vllm_serverless-*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the wheel is installed in; what it depends on is this environment's."""
    directory = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return directory


@pytest.fixture
def run(site: Path, tmp_path: Path) -> Run:
    """Run a command of the installed wheel, in a directory that holds nothing of this repository."""

    def run(command: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site), **variables}
        return subprocess.run(
            [site / "bin" / command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


PACKAGES = ("batch", "builder", "deploy", "emulator", "engine", "runpod_api")
COMMANDS = ("batch", "builder", "deploy", "emulator")


def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    packages = [path for name in PACKAGES for path in (ROOT / name).rglob("*.*")]
    files = [str(path.relative_to(ROOT)) for path in packages if "__pycache__" not in path.parts]

    assert sorted(names) == sorted([*files, "handler.py", "test_input.json"])
    assert "emulator/page/index.html" in names


@pytest.mark.parametrize("command", ["vllm-serverless", *(f"vllm-serverless-{name}" for name in COMMANDS)])
def test_each_command_shows_its_help(run: Run, command: str) -> None:
    shown = run(command, "--help")

    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: ")


def test_the_installed_worker_prints_its_configuration(run: Run, tiny_model: str) -> None:
    shown = run("vllm-serverless", "--print-config", MODEL_NAME=tiny_model)

    assert shown.returncode == 0, shown.stderr
    assert f"MODEL={tiny_model}  (environment, MODEL_NAME)" in shown.stdout


def test_a_worker_without_vllm_says_what_to_install(run: Run, site: Path, tiny_model: str, tmp_path: Path) -> None:
    """A finder before all others stands for an environment that has no vLLM."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoVLLM:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'vllm':\n"
        "            raise ModuleNotFoundError(\"No module named 'vllm'\", name='vllm')\n"
        "sys.meta_path.insert(0, NoVLLM)\n"
    )

    shown = run("vllm-serverless", "--print-config", MODEL_NAME=tiny_model, PYTHONPATH=f"{tmp_path}{os.pathsep}{site}")

    assert shown.returncode == 1
    assert shown.stderr.startswith("vLLM is not installed: ")
    assert shown.stderr.count("\n") == 1
