"""Which model is served when none is named."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from engine import models
from engine.errors import ConfigurationError
from engine.settings import Settings


def settings(**values: Any) -> Settings:
    return Settings.model_validate({"baked_model_dir": "/nowhere", **values})


def test_the_named_model_comes_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    model = models.choose(settings(baked_model_dir=tmp_path), "org/model", ["a"])

    assert model == models.Model("org/model", ("a", "org/model"))


def test_the_model_in_the_image_is_served_under_its_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    assert models.choose(settings(baked_model_dir=tmp_path), None) == models.Model(str(tmp_path), (str(tmp_path),))


def test_on_the_platform_a_worker_without_a_model_does_not_start() -> None:
    with pytest.raises(ConfigurationError, match="set MODEL_NAME"):
        models.choose(settings(runpod_webhook_get_job="http://queue/"), None)


def test_off_the_platform_it_is_the_tiny_model_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = subprocess.CompletedProcess([], 0, stdout=b"/cache/tiny\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: made)
    caplog.set_level("INFO", "engine")

    assert models.choose(settings(), None) == models.Model("/cache/tiny", ("tiny", "/cache/tiny"))
    assert "tiny model, as MODEL_NAME is not set" in caplog.text


def test_a_tiny_model_that_cannot_be_made_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, stdout=b""))

    with pytest.raises(ConfigurationError, match="could not be made"):
        models.choose(settings(), None)


def test_a_model_of_the_hubs_cache_answers_to_its_hub_id_too(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--some--model" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)

    model = models.choose(settings(), str(snapshot), ["first", "second"])

    assert model.names == ("first", "second", "org/some--model", str(snapshot))


def test_a_named_directory_has_to_be_there() -> None:
    with pytest.raises(ConfigurationError, match="no such directory"):
        models.choose(settings(), "/nowhere/model")
