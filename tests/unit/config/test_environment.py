"""The variables of the environment, over those that the image was built with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import environment
from engine.errors import ConfigurationError

BAKED = {"MODEL_NAME": "org/Model", "QUANTIZATION": "bitsandbytes", "MAX_MODEL_LEN": 8192}


@pytest.fixture
def image(tmp_path: Path) -> dict[str, str]:
    """An environment in which the image's settings are these."""
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(BAKED))
    return {"BAKED_SETTINGS_FILE": str(file)}


@pytest.mark.parametrize("own", [{}, {"MODEL_NAME": ""}, {"MODEL_NAME": "org/model"}, {"model_name": "org/Model"}])
def test_what_the_image_was_built_with_is_used_for_its_model(image: dict[str, str], own: dict[str, str]) -> None:
    given = environment.read({**image, **own, "DTYPE": "half"})

    assert (given["QUANTIZATION"].value, given["MAX_MODEL_LEN"].value) == ("bitsandbytes", "8192")
    assert given["QUANTIZATION"].source == image["BAKED_SETTINGS_FILE"]
    assert given["DTYPE"] == environment.Variable("half", environment.ENVIRONMENT)


@pytest.mark.parametrize("own", [{"MODEL_NAME": "org/another"}, {"MODEL": "/a/directory"}])
def test_what_the_image_was_built_with_is_not_used_for_another_model(
    image: dict[str, str], own: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "engine")

    given = environment.read({**image, **own})

    assert set(given) == {"BAKED_SETTINGS_FILE", *own}
    assert "is for org/Model, and so not used" in caplog.text


def test_settings_of_an_image_without_a_model_are_for_every_model(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"DRAIN_TIMEOUT_S": 7}')

    given = environment.read({"BAKED_SETTINGS_FILE": str(tmp_path / "settings.json"), "MODEL_NAME": "org/any"})

    assert given["DRAIN_TIMEOUT_S"].value == "7"


@pytest.mark.parametrize(
    ("own", "token"),
    [
        ({"HUGGING_FACE_HUB_TOKEN": "old"}, "old"),
        ({"HUGGING_FACE_HUB_TOKEN": "old", "HF_TOKEN": "new"}, "new"),
        ({"HUGGING_FACE_HUB_TOKEN": "old", "HF_TOKEN": ""}, "old"),
    ],
)
def test_the_token_has_an_older_name_as_for_the_hubs_client(own: dict[str, str], token: str) -> None:
    assert environment.read(own)["HF_TOKEN"].value == token


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_a_file_that_is_no_object_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)

    with pytest.raises(ConfigurationError, match="is not a JSON"):
        environment.read({"BAKED_SETTINGS_FILE": str(tmp_path / "settings.json")})
