"""The tiny model in place of the model that an endpoint asks for."""

from __future__ import annotations

from emulator.control_plane.stand_in import stand_in


def test_the_tiny_model_answers_under_the_name_of_the_model_that_is_asked_for() -> None:
    env = {"MODEL_NAME": "unsloth/phi-4-bnb-4bit", "QUANTIZATION": "bitsandbytes", "MAX_CONCURRENCY": "8"}
    result, note = stand_in(env, "/models/tiny")
    assert result == {
        "MODEL_NAME": "/models/tiny",
        "SERVED_MODEL_NAME": "unsloth/phi-4-bnb-4bit",
        "TOOL_CALL_PARSER": "hermes",
        "ENABLE_AUTO_TOOL_CHOICE": "true",
        "MAX_CONCURRENCY": "8",
    }
    assert note == (
        "unsloth/phi-4-bnb-4bit is not loaded: a tiny model answers as unsloth/phi-4-bnb-4bit; left out: QUANTIZATION"
    )


def test_a_served_name_of_the_endpoints_own_comes_first() -> None:
    assert stand_in({"MODEL_NAME": "a/b", "SERVED_MODEL_NAME": "phi-4"}, "/t")[0]["SERVED_MODEL_NAME"] == "phi-4"


def test_without_a_model_it_is_the_images() -> None:
    result, note = stand_in({}, "/t")
    assert (result["MODEL_NAME"], result["SERVED_MODEL_NAME"]) == ("/t", "tiny")
    assert note == "the image's model is not loaded: a tiny model answers as tiny"
