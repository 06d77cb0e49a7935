"""Settings: what is accepted, what a mistake is told, and that the README says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ConfigurationError
from engine.settings import Settings, markdown_table

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_every_setting_has_a_default() -> None:
    settings = Settings.read()

    assert settings.max_concurrency == "auto"
    assert not settings.on_platform


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_NAME", "org/model")
    monkeypatch.setenv("SERVED_MODEL_NAME", "a, b,")
    monkeypatch.setenv("MAX_CONCURRENCY", "8")
    monkeypatch.setenv("MAX_MODEL_LEN", "16k")
    monkeypatch.setenv("ENFORCE_EAGER", "true")
    monkeypatch.setenv("QUANTIZATION", "")
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://queue/")

    settings = Settings.read()

    assert (settings.model_name, settings.served_model_name) == ("org/model", ["a", "b"])
    assert (settings.max_concurrency, settings.max_model_len, settings.enforce_eager) == (8, "16k", True)
    assert settings.quantization is None
    assert settings.on_platform


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("DTYPE", "float8", "`auto`, `half`, `float16`"),
        ("MAX_MODEL_LEN", "-4", "such as `8192`, `16k`, `auto`"),
        ("MAX_MODEL_LEN", "lots", "such as `8192`, `16k`, `auto`"),
        ("GPU_MEMORY_UTILIZATION", "1.5", "a number above 0 to 1"),
        ("GPU_MEMORY_UTILIZATION", "most", "a number above 0 to 1"),
        ("TENSOR_PARALLEL_SIZE", "0", "a whole number above 0"),
        ("TENSOR_PARALLEL_SIZE", "1.5", "a whole number above 0"),
        ("ENFORCE_EAGER", "perhaps", "`true` or `false`"),
        ("MAX_CONCURRENCY", "many", "a whole number above 0 or `auto`"),
        ("BATCH_INTERVAL_MS", "-1", "a whole number from 0 to 10000"),
    ],
)
def test_a_bad_value_names_the_variable_the_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError) as caught:
        Settings.read()

    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{name}={value!r} is not allowed. Allowed: {allowed}")


def test_all_bad_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTYPE", "x")
    monkeypatch.setenv("TENSOR_PARALLEL_SIZE", "x")

    with pytest.raises(ConfigurationError) as caught:
        Settings.read()

    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == ["DTYPE", "TENSOR_PARALLEL_SIZE"]


def test_a_secret_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("DTYPE", "x")

    with pytest.raises(ConfigurationError) as caught:
        Settings.read()
    monkeypatch.delenv("DTYPE")

    assert "verysecret" not in f"{caught.value} {Settings.read()!r} {Settings.read().model_dump_json()}"


def test_the_readme_has_the_settings_as_they_are_declared() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    assert f"<!-- settings -->\n{markdown_table()}\n<!-- /settings -->" in readme, "run `make docs`"
