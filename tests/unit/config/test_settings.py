"""Settings: what is accepted, and what a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.environment import Variable
from engine.config.settings import Settings, allowed
from engine.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_every_setting_has_a_default() -> None:
    settings = Settings.read()

    assert settings.max_concurrency == "auto"
    assert not settings.on_platform


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_CONCURRENCY", "8")
    monkeypatch.setenv("ALLOWED_ROUTES", "/metrics, /sleep,")
    monkeypatch.setenv("LOG_JOB_INPUTS", "true")
    monkeypatch.setenv("BATCH_INTERVAL_MS", "")
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://queue/")

    settings = Settings.read()

    assert (settings.max_concurrency, settings.batch_interval_ms, settings.log_job_inputs) == (8, "auto", True)
    assert settings.allowed_routes == {"/metrics", "/sleep"}
    assert settings.on_platform


def test_settings_of_the_image_give_way_to_the_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    baked = tmp_path / "settings.json"
    baked.write_text('{"MAX_CONCURRENCY": 4, "drain_timeout_s": 7, "BATCH_INTERVAL_MS": null}')
    monkeypatch.setenv("BAKED_SETTINGS_FILE", str(baked))
    monkeypatch.setenv("MAX_CONCURRENCY", "8")

    settings = Settings.read()

    assert (settings.max_concurrency, settings.drain_timeout_s, settings.batch_interval_ms) == (8, 7, "auto")


@pytest.mark.parametrize("text", ["{", "[1]", "1"])
def test_settings_of_the_image_that_are_no_json_object_stop_the_start(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    baked = tmp_path / "settings.json"
    baked.write_text(text)
    monkeypatch.setenv("BAKED_SETTINGS_FILE", str(baked))

    with pytest.raises(
        ConfigurationError, match=r"settings\.json' cannot be read as JSON|settings\.json is not a JSON object"
    ):
        Settings.read()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("DRAIN_TIMEOUT_S", "soon", "number ≥ 0"),
        ("DELIVERY_TIMEOUT_S", "0", "number > 0"),
        ("LOG_JOB_INPUTS", "perhaps", "`true` or `false`"),
        ("MAX_CONCURRENCY", "many", "integer ≥ 1 or `auto`"),
        ("BATCH_INTERVAL_MS", "-1", "integer ≥ 0, ≤ 10000 or `auto`"),
        ("ALLOWED_ROUTES", "metrics", "such as `/metrics`, `/sleep,/wake_up`"),
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


@pytest.mark.parametrize("none", ["None", "none", "null"])
def test_none_is_not_given(monkeypatch: pytest.MonkeyPatch, none: str) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(name.upper(), none)

    assert Settings.read() == Settings()


def test_all_bad_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_CONCURRENCY", "x")
    monkeypatch.setenv("BATCH_INTERVAL_MS", "x")

    with pytest.raises(ConfigurationError) as caught:
        Settings.read()

    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == [
        "MAX_CONCURRENCY",
        "BATCH_INTERVAL_MS",
    ]


def test_a_secret_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("MAX_CONCURRENCY", "x")

    with pytest.raises(ConfigurationError) as caught:
        Settings.read()
    monkeypatch.delenv("MAX_CONCURRENCY")

    assert "verysecret" not in f"{caught.value} {Settings.read()!r} {Settings.read().model_dump_json()}"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vllm_config_file", "file path"),
        ("baked_settings_file", "file path"),
        ("baked_model_dir", "directory path"),
    ],
)
def test_a_path_is_told_to_be_a_file_or_a_directory(name: str, told: str) -> None:
    assert allowed(name) == told


def test_a_file_that_is_not_there_is_no_fault_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CONFIG_FILE", "/nowhere.yaml")

    assert Settings.read().vllm_config_file == Path("/nowhere.yaml")


@pytest.mark.parametrize("value", ["inf", "1e400", "nan"])
def test_a_time_is_finite(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"DRAIN_TIMEOUT_S=.* is not allowed"):
        Settings.read({"DRAIN_TIMEOUT_S": Variable(value, "environment")})


@pytest.mark.parametrize("value", ["/metrics, /sleep", '["/metrics", "/sleep"]'])
def test_routes_are_a_list_of_json_or_with_commas(value: str) -> None:
    assert Settings.read({"ALLOWED_ROUTES": Variable(value, "file")}).allowed_routes == {"/metrics", "/sleep"}


def test_routes_with_spaces_between_them_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="ALLOWED_ROUTES="):
        Settings.read({"ALLOWED_ROUTES": Variable("/metrics /sleep", "file")})


@pytest.mark.parametrize(
    ("variables", "queue"),
    [
        ({}, None),
        ({"EASE_AGENT_URL": "http://localhost:8087"}, "spirit"),
        ({"EASE_AGENT_URL": "http://localhost:8087", "RUNPOD_WEBHOOK_GET_JOB": "http://queue/"}, "runpod"),
        ({"PLATFORM": "spirit"}, "spirit"),
        ({"PLATFORM": "spirit", "RUNPOD_WEBHOOK_GET_JOB": "http://queue/"}, "spirit"),
        ({"PLATFORM": "runpod", "RUNPOD_WEBHOOK_GET_JOB": "http://queue/"}, "runpod"),
        ({"PLATFORM": "runpod", "EASE_AGENT_URL": "http://localhost:8087"}, None),
    ],
)
def test_the_platform_is_the_one_that_is_named_or_whose_variable_is_set(
    variables: dict[str, str], queue: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert Settings.read().queue == queue


ON_RUNPOD = {"RUNPOD_ENDPOINT_ID": "ep", "RUNPOD_POD_ID": "pod"}


@pytest.mark.parametrize(
    ("variables", "serves_http"),
    [
        ({}, False),
        ({"PORT": "8080"}, False),
        ({"RUNPOD_POD_ID": "pod", "PORT": "8080"}, False),
        (ON_RUNPOD, True),
        ({**ON_RUNPOD, "RUNPOD_WEBHOOK_GET_JOB": "http://queue/"}, False),
        ({**ON_RUNPOD, "RUNPOD_WEBHOOK_GET_JOB": "http://queue/", "ENDPOINT_TYPE": "load_balancer"}, True),
        ({**ON_RUNPOD, "ENDPOINT_TYPE": "queue"}, False),
        ({**ON_RUNPOD, "EASE_AGENT_URL": "http://localhost:8087"}, False),
        ({**ON_RUNPOD, "PLATFORM": "spirit"}, False),
        ({"ENDPOINT_TYPE": "load_balancer"}, True),
    ],
)
def test_http_is_served_where_runpod_gives_ids_and_no_queue_or_the_setting_says_so(
    variables: dict[str, str], serves_http: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    settings = Settings.read()

    assert settings.serves_http is serves_http
    assert not (settings.serves_http and settings.queue)


def test_a_port_that_is_no_number_is_refused_only_where_http_is_served() -> None:
    """Kubernetes gives such values to containers beside a service of that name."""
    variables = {"PORT": Variable("tcp://10.0.0.1:80", "environment")}

    assert Settings.read(variables).port == Settings().port
    with pytest.raises(ConfigurationError, match=r"PORT='tcp://10.0.0.1:80' is not allowed. Allowed: integer"):
        Settings.read({**variables, "ENDPOINT_TYPE": Variable("load_balancer", "environment")})


def test_spirit_has_no_load_balancing_endpoints() -> None:
    variables = {"PLATFORM": "spirit", "ENDPOINT_TYPE": "load_balancer"}

    with pytest.raises(ConfigurationError, match="ENDPOINT_TYPE=load_balancer is RunPod's"):
        Settings.read({name: Variable(value, "environment") for name, value in variables.items()})
