"""What RunPod's hub offers to set and runs as tests; what comes of vLLM's parser is in the integration tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.config.environment import ENVIRONMENT, Variable
from engine.config.settings import Settings, is_secret
from engine.jobs import inputs
from tools import runpod_hub

ROOT = Path(__file__).parents[3]
LISTING = json.loads((ROOT / ".runpod/hub.json").read_text(encoding="utf-8"))
TESTS = json.loads((ROOT / ".runpod/tests.json").read_text(encoding="utf-8"))
INPUTS = {entry["key"]: entry["input"] for entry in LISTING["config"]["env"]}

# The hub's publishing guide: types of inputs, and the fields that each may have.
COMMON = {"name", "type", "description", "default", "required", "advanced"}
FIELDS = {
    "string": COMMON | {"options"},
    "huggingface": COMMON,
    "number": COMMON | {"min", "max"},
    "boolean": COMMON | {"trueValue", "falseValue"},
}


def test_the_listing_offers_the_settings_as_they_are_declared() -> None:
    own = runpod_hub.setting_inputs()

    assert LISTING["config"]["env"][-len(own) :] == own, "run `make docs`"


def test_the_rest_of_the_listing_is_the_generators() -> None:
    config = {name: value for name, value in LISTING["config"].items() if name != "env"}

    assert {**LISTING, "config": config} == {**runpod_hub.LISTING, "config": runpod_hub.MACHINE}, "run `make docs`"


def test_every_flag_that_is_offered_is_in_the_readmes_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {
        name for row in re.findall(r"^\| (`[^|]+)\|", readme, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }

    assert [name for name in runpod_hub.FLAGS if name not in named] == []
    assert list(INPUTS)[: len(runpod_hub.FLAGS)] == list(runpod_hub.FLAGS)


def test_no_secret_and_nothing_that_is_set_by_the_image_or_the_platform_or_is_for_another_is_offered() -> None:
    left_out = {name.upper() for name in Settings.model_fields} - INPUTS.keys()

    secret = {"HF_TOKEN", "RUNPOD_WEBHOOK_GET_JOB"}
    with_a_secret = {name.upper() for name in Settings.model_fields if name.startswith("bucket_")}
    spirits = {"EASE_AGENT_URL", "PLATFORM", "SPIRIT_REQUEST_TIMEOUT_S"}
    of_the_platform = {"LISTEN_HOST", "RUNPOD_ENDPOINT_ID", "RUNPOD_POD_ID"}
    of_the_image = {"BAKED_MODEL_DIR", "BAKED_SETTINGS_FILE", "COMPILE_CACHE_DIR"}
    assert left_out == {*of_the_image, *of_the_platform, *secret, *spirits, *with_a_secret}
    assert not [name for name in INPUTS if name.lower() in Settings.model_fields and is_secret(name.lower())]


@pytest.mark.parametrize("name", INPUTS)
def test_every_input_is_one_that_the_hub_knows(name: str) -> None:
    offered = INPUTS[name]

    assert offered.keys() <= FIELDS[offered["type"]]
    assert {"name", "type", "description"} <= offered.keys()
    assert "`" not in offered["description"]


@pytest.mark.parametrize("name", [name for name in INPUTS if name.lower() in Settings.model_fields])
def test_what_the_form_gives_is_what_the_worker_takes(name: str) -> None:
    offered = INPUTS[name]
    texts = [str(offered[bound]) for bound in ("min", "max", "trueValue", "falseValue") if bound in offered]
    texts += [str(offered["default"])] if "default" in offered else []

    for text in texts:
        Settings.read({name: Variable(text, ENVIRONMENT)})
    if "default" in offered:
        given = Settings.read({name: Variable(str(offered["default"]), ENVIRONMENT)})
        assert given == Settings.read({})


@pytest.mark.parametrize("test", TESTS["tests"], ids=lambda test: test["name"])
def test_the_hubs_tests_are_jobs_that_the_worker_accepts(test: dict[str, Any]) -> None:
    request = inputs.parse({"id": "hub", "input": test["input"]}, max_model_len=4096)

    assert request.path in {"/v1/chat/completions", "/v1/completions", "/v1/models"}
    assert test.keys() == {"name", "input", "timeout"}
    assert 10_000 <= test["timeout"] <= 600_000, "milliseconds, and at most what the endpoint gives a job"


def test_the_hub_tests_on_a_machine_that_the_listing_allows() -> None:
    machine = TESTS["config"]

    assert machine.keys() == {"gpuTypeId", "gpuCount", "env", "allowedCudaVersions"}
    assert machine["allowedCudaVersions"] == runpod_hub.MACHINE["allowedCudaVersions"]
    assert machine["gpuCount"] == runpod_hub.MACHINE["gpuCount"]
    assert {"NVIDIA GeForce RTX 4090": "ADA_24"}[machine["gpuTypeId"]] in runpod_hub.MACHINE["gpuIds"].split(",")
