"""The lock files have the SDKs that pyproject.toml pins, and nothing that these need only for their developers."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
PROJECT = tomllib.loads((REQUIREMENTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("name", ["cpu", "gpu", "worker"])
def test_spirits_sdk_is_locked_without_its_code_generator(name: str) -> None:
    lines = (REQUIREMENTS / f"{name}.lock").read_text(encoding="utf-8").splitlines()
    names = {line.partition("==")[0] for line in lines}

    assert set(PROJECT["optional-dependencies"]["spirit"]) <= set(lines)
    assert not {"dacite", "datamodel-code-generator", "black", "isort"} & names
