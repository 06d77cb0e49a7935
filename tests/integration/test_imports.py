"""What a start imports: nothing that has to be compiled first, and not more modules than today."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import imports
from tests.processes import ROOT

# 5,400 with vLLM 0.32, from source, bytecode or a library: a new vLLM or SDK may need a few more.
MAX_MODULES = 5600
# The commands of the CPU image that compile its packages, and the worker's own code.
COMMANDS = re.compile(r"^RUN (python3 [^\n]*\bcompileall\b.*?[^\\])$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def bytecode() -> Iterator[Path]:
    """Bytecode of everything, made as the image makes it, in a directory of its own: 400 MB, which takes a minute."""
    commands = COMMANDS.findall((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert len(commands) == 4, "two for each kind of image"
    assert commands[:2] == commands[2:]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as directory:
        for command in commands[:2]:
            environment = {**os.environ, "PATH": path, "PYTHONPYCACHEPREFIX": directory}
            subprocess.run(["/bin/sh", "-c", command], cwd=ROOT, env=environment, check=True)
        yield Path(directory)


@pytest.fixture(scope="module")
def document(bytecode: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `python -m bench imports` writes of a worker that finds this bytecode, and can write none."""
    out = tmp_path_factory.mktemp("imports")
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(bytecode), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "bench", "imports", f"--out={out}"]
    printed = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert printed == (out / "imports.txt").read_text()
    result: dict[str, Any] = json.loads((out / "imports.json").read_bytes())
    return result


def test_a_start_compiles_nothing_that_it_imports(document: dict[str, Any]) -> None:
    """Whichever of its processes imports it: the checks of the machine, the worker, or the engine's."""
    records = [imports.Record(**record) for record in document["modules"]]

    assert {record.package for record in records} >= {"engine", "vllm", "torch", "transformers", "runpod", "asyncio"}
    assert len({record.process for record in records}) > 1
    assert [record.module for record in records if record.compiled] == []


def test_a_start_imports_no_more_modules_than_it_did(document: dict[str, Any]) -> None:
    assert sum(package["modules"] for package in document["packages"]) < MAX_MODULES, document["packages"]
