"""The listing for RunPod's Hub agrees with vLLM's own parser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.backend import vllm_args
from engine.config.environment import ENVIRONMENT, Variable
from engine.config.vllm_flags import Flags
from tools import runpod_hub

pytestmark = [pytest.mark.in_process, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # from vLLM's imports

LISTING = json.loads((Path(__file__).parents[2] / ".runpod/hub.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def flags() -> Flags:
    return vllm_args.flags()


def test_the_listing_is_up_to_date(flags: Flags) -> None:
    assert runpod_hub.document(flags) == LISTING, "run `make docs`"


def test_vllm_accepts_every_choice_of_the_listing(flags: Flags) -> None:
    choices = [
        (entry["key"], option["value"])
        for entry in runpod_hub.flag_inputs(flags)
        for option in entry["input"].get("options", [])
        if option["value"]
    ]

    for name, value in choices:
        flags.load({name: Variable(value, ENVIRONMENT)}, [])

    assert {"DTYPE", "TOOL_CALL_PARSER"} == {name for name, _ in choices}
    assert ("DTYPE", "bfloat16") in choices
    assert ("TOOL_CALL_PARSER", "hermes") in choices
