"""The variables of the environment, over those that the image was built with."""

from __future__ import annotations

import json
from datetime import date
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


@pytest.mark.parametrize(
    "own",
    [{}, *({"MODEL_NAME": name} for name in ("", "None", "null", "org/model")), {"model_name": "org/Model"}],
    ids=str,
)
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
    assert "its settings are for org/Model" in caplog.text


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
def test_a_file_that_is_not_an_object_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)

    with pytest.raises(ConfigurationError, match=r"is not a JSON object|cannot be read as JSON"):
        environment.read({"BAKED_SETTINGS_FILE": str(tmp_path / "settings.json")})


def test_a_file_that_is_named_and_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"BAKED_SETTINGS_FILE='.*/none.json' cannot be read"):
        environment.read({"BAKED_SETTINGS_FILE": str(tmp_path / "none.json")})


@pytest.mark.parametrize("value", ["", "None", "null", " "])
def test_no_file_need_be_named(value: str) -> None:
    assert environment.read({"BAKED_SETTINGS_FILE": value, "DTYPE": "half"})["DTYPE"].value == "half"


@pytest.mark.parametrize(
    ("baked", "own", "effective"),
    [
        ({}, {"JOB_TIMEOUT_S": "5"}, "5"),
        ({}, {"JOB_TIMEOUT_S": "5", "DELIVERY_TIMEOUT_S": "6"}, "6"),
        ({"DELIVERY_TIMEOUT_S": 7}, {"JOB_TIMEOUT_S": "5"}, "5"),
        ({"JOB_TIMEOUT_S": 7}, {"DELIVERY_TIMEOUT_S": "6"}, "6"),
        ({"JOB_TIMEOUT_S": 7}, {}, "7"),
        ({}, {"JOB_TIMEOUT_S": "5", "DELIVERY_TIMEOUT_S": "None"}, "5"),
    ],
    ids=str,
)
def test_a_setting_still_has_its_former_name_where_that_is_given(
    baked: dict[str, int], own: dict[str, str], effective: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(baked))

    given = environment.read({"BAKED_SETTINGS_FILE": str(tmp_path / "settings.json"), **own})

    assert given["DELIVERY_TIMEOUT_S"].value == effective
    assert "JOB_TIMEOUT_S" not in given
    assert "JOB_TIMEOUT_S is deprecated" in caplog.text
    assert "use DELIVERY_TIMEOUT_S" in caplog.text


@pytest.mark.parametrize(
    ("own", "token"),
    [
        ({"HF_TOKEN": "None"}, None),
        ({"HF_TOKEN": "null", "HUGGING_FACE_HUB_TOKEN": "old"}, "old"),
        ({"HUGGING_FACE_HUB_TOKEN": "None"}, None),
        ({"HUGGING_FACE_HUB_TOKEN": "old"}, "old"),
        ({"HF_TOKEN": "new"}, "new"),
    ],
    ids=str,
)
def test_the_hubs_client_finds_the_token_that_is_given_and_no_other(
    own: dict[str, str], token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import get_token

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)

    environment.export_token(environment.read())

    assert get_token() == token


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (" a ", "a"), (True, "true"), (0.5, "0.5"), ([1], "[1]"), (date(2025, 1, 9), "2025-01-09"),
     ({"a": date(2025, 1, 9)}, '{"a": "2025-01-09"}')],
)  # fmt: skip
def test_a_value_of_json_or_yaml_becomes_text(value: object, text: str) -> None:
    assert environment.as_text(value) == text
