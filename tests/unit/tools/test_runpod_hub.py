"""What RunPod's hub offers to set and runs as tests; what comes of vLLM's parser is in the integration tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

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
    made = {**runpod_hub.MACHINE, "presets": runpod_hub.PRESETS}

    assert {**LISTING, "config": config} == {**runpod_hub.LISTING, "config": made}, "run `make docs`"


def test_the_listing_has_the_fields_of_the_guide() -> None:
    assert LISTING.keys() <= {"title", "description", "type", "category", "iconUrl", "config"}
    assert LISTING["type"] == "serverless"
    assert LISTING["category"] in {"audio", "embedding", "language", "video", "image"}
    fields = {
        "runsOn",
        "endpointType",
        "containerDiskInGb",
        "gpuCount",
        "gpuIds",
        "allowedCudaVersions",
        "env",
        "presets",
    }
    assert LISTING["config"].keys() <= fields


@pytest.mark.parametrize("preset", LISTING["config"]["presets"], ids=lambda preset: preset["name"])
def test_a_preset_sets_what_the_form_offers_to_what_it_accepts(preset: dict[str, Any]) -> None:
    assert preset.keys() == {"name", "defaults"}
    for name, value in preset["defaults"].items():
        offered = INPUTS[name]
        assert isinstance(value, bool) == (offered["type"] == "boolean")
        if "options" in offered:
            assert value in [option["value"] for option in offered["options"]]


class _NoFlags:
    """Stands for vLLM's flags, which are not imported here."""

    actions: ClassVar[dict[str, Any]] = {}


def test_a_listing_for_load_balancers_has_the_type_and_fixed_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod_hub, "FLAGS", {})

    made = runpod_hub.document(_NoFlags(), "https://example.com/icon.png", load_balancer=True)  # type: ignore[arg-type]

    assert made["iconUrl"] == "https://example.com/icon.png"
    assert made["config"]["endpointType"] == "LB"
    assert {one["key"]: one["value"] for one in made["config"]["env"] if "value" in one} == runpod_hub.LOAD_BALANCER
    keys = [one["key"] for one in made["config"]["env"]]
    assert len(keys) == len(set(keys))


def test_the_ordinary_listing_is_for_a_queue() -> None:
    """The hub's tests send jobs, and a listing has one type."""
    assert "endpointType" not in LISTING["config"]


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
