"""The command line, without starting an emulator."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from emulator import cli
from emulator.app import Emulator
from emulator.control_plane.settings import ControlPlaneSettings
from emulator.errors import SettingsError
from emulator.settings import BalancerSettings, EmulatorSettings, EndpointSettings
from emulator.spirit.settings import SpiritEndpointSettings


def write(path: Path, document: Any) -> str:
    path.write_text(json.dumps(document))
    return str(path)


def test_defaults_are_one_endpoint_with_the_default_worker_and_the_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_tiny_model_dir", lambda: "/models/tiny")
    monkeypatch.delenv("MODEL_NAME", raising=False)
    settings, quiet = cli.read_settings([])
    (endpoint,) = settings.endpoints
    assert (settings.host, settings.port, settings.api_keys, quiet) == ("127.0.0.1", 8000, ("local",), False)
    assert not settings.tls
    assert (endpoint.id, endpoint.workers_min, endpoint.workers_max) == ("local", 0, 2)
    assert (endpoint.scaler_type, endpoint.scaler_value) == ("QUEUE_DELAY", 4)
    assert Path(endpoint.command[-1]).name == "handler.py"
    assert endpoint.env == {
        "MODEL_NAME": "/models/tiny",
        "SERVED_MODEL_NAME": "tiny",
        "TOOL_CALL_PARSER": "hermes",
        "ENABLE_AUTO_TOOL_CHOICE": "true",
    }


def test_settings_of_the_tiny_model_can_be_overridden_and_empty_values_count_as_unset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "_tiny_model_dir", lambda: "/models/tiny")
    monkeypatch.setenv("MODEL_NAME", "")
    monkeypatch.setenv("TOOL_CALL_PARSER", "xlam")
    (endpoint,) = cli.read_settings(["--env", "SERVED_MODEL_NAME=mine", "--env", "ENABLE_AUTO_TOOL_CHOICE="])[
        0
    ].endpoints
    assert endpoint.env == {
        "MODEL_NAME": "/models/tiny",
        "SERVED_MODEL_NAME": "mine",
        "ENABLE_AUTO_TOOL_CHOICE": "true",
    }


def control_plane(*options: str) -> ControlPlaneSettings:
    settings, _ = cli.read_settings(list(options))
    assert isinstance(settings, EmulatorSettings)
    return settings.control_plane


def test_created_endpoints_have_the_options_of_the_first_and_the_tiny_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "_tiny_model_dir", lambda: "/models/tiny")
    monkeypatch.delenv("MODEL_NAME", raising=False)
    options = [
        "--grace",
        "7",
        "--env",
        "A=1",
        "--endpoint",
        "first",
        "--no-rate-limits",
        "--scaler-type",
        "QUEUE_DELAY",
    ]
    settings = control_plane(*options)
    assert Path(settings.endpoint["command"][-1]).name == "handler.py"
    assert {name: settings.endpoint[name] for name in ("grace", "env")} == {"grace": 7, "env": {"A": "1"}}
    assert not {"id", "scalerType"} & settings.endpoint.keys()
    assert (settings.model_dir, settings.rate_limits) == ("/models/tiny", None)


@pytest.mark.parametrize(
    "options", [["--load-models", "--no-endpoint"], ["--env", "MODEL_NAME=a/b"], ["--command", "worker"]]
)
def test_created_endpoints_load_the_model_that_they_ask_for(
    monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(cli, "_tiny_model_dir", lambda: pytest.fail("not needed"))
    monkeypatch.delenv("MODEL_NAME", raising=False)
    settings = control_plane(*options)
    assert settings.model_dir is None
    assert settings.endpoint["command"] == "worker" or len(settings.endpoint["command"]) == 2


def test_the_emulator_starts_without_an_endpoint(tmp_path: Path) -> None:
    assert cli.read_settings(["--no-endpoint", "--command", "worker"])[0].endpoints == ()
    with pytest.raises(SettingsError, match="remove the options for no_endpoint"):
        cli.read_settings(["--config", write(tmp_path / "config", {}), "--no-endpoint"])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"endpoints": [{"id": "serverless"}]}, "id=serverless is a path of the control plane"),
        ({"controlPlane": {"permissions": {"other": "READ"}}}, "a key is none of apiKeys"),
        ({"controlPlane": {"rateLimits": {"minute": 0}}}, "controlPlane.rateLimits.minute"),
    ],
)
def test_wrong_control_plane_settings_are_refused(tmp_path: Path, document: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        cli.read_settings(["--config", write(tmp_path / "config", document)])


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ({"colour": 1}, "controlPlane.endpoint: colour cannot be set"),
        ({"workersMax": 1}, "controlPlane.endpoint: workersMax cannot be set"),
        ({"grace": -1}, "controlPlane.endpoint: grace"),
    ],
)
def test_wrong_settings_of_created_endpoints_are_refused(endpoint: dict[str, Any], message: str) -> None:
    settings = EmulatorSettings.model_validate({"port": 0, "controlPlane": {"endpoint": endpoint}})
    with pytest.raises(SettingsError, match=message):
        Emulator(settings)


def test_a_configured_model_is_not_replaced_by_the_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_tiny_model_dir", lambda: pytest.fail("not needed"))
    monkeypatch.delenv("MODEL_NAME", raising=False)
    assert cli.read_settings(["--env", "MODEL_NAME=mine"])[0].endpoints[0].env == {"MODEL_NAME": "mine"}
    monkeypatch.setenv("BAKED_MODEL_DIR", "/workspace/vllm/phi-4-bnb-4bit")
    assert cli.read_settings([])[0].endpoints[0].env == {}
    monkeypatch.setenv("MODEL_NAME", "mine")
    assert cli.read_settings([])[0].endpoints[0].env == {}


def test_every_option_sets_its_setting() -> None:
    options = {
        "--workers-min": ("1", "workers_min", 1),
        "--workers-max": ("5", "workers_max", 5),
        "--scaler-type": ("REQUEST_COUNT", "scaler_type", "REQUEST_COUNT"),
        "--scaler-value": ("2.5", "scaler_value", 2.5),
        "--idle-timeout": ("7", "idle_timeout_s", 7),
        "--execution-timeout-ms": ("9000", "execution_timeout_ms", 9000),
        "--init-timeout": ("11", "init_timeout_s", 11),
        "--grace": ("3", "grace_s", 3),
        "--long-poll": ("4", "long_poll_s", 4),
        "--ping-interval": ("2000", "ping_interval_ms", 2000),
        "--lost-after": ("13", "lost_after_s", 13),
        "--max-retries": ("6", "max_retries", 6),
        "--frozen-timeout": ("14", "frozen_timeout_s", 14),
    }
    argv = ["--endpoint", "ep", "--command", "run 'a b'", "--env", "A=1=2", "--env", "B=", "--no-rate-limits"]
    argv.append("--flashboot")
    for option, (text, _, _) in options.items():
        argv += [option, text]
    settings, _ = cli.read_settings([*argv, "--port", "0", "--host", "0.0.0.0", "--api-key", "k1", "--api-key", "k2"])
    (endpoint,) = settings.endpoints
    assert (endpoint.id, endpoint.command, endpoint.env) == ("ep", ("run", "a b"), {"A": "1=2", "B": ""})
    assert {name: getattr(endpoint, name) for _, name, _ in options.values()} == {
        name: value for _, name, value in options.values()
    }
    assert isinstance(endpoint, EndpointSettings)
    assert not endpoint.rate_limits
    assert endpoint.flashboot
    assert (settings.host, settings.port, settings.api_keys) == ("0.0.0.0", 0, ("k1", "k2"))
    assert options.keys() == cli._ENDPOINT_OPTIONS.keys()


def test_files_can_define_several_endpoints_and_faults(tmp_path: Path) -> None:
    config = write(
        tmp_path / "config",
        {"apiKeys": ["k"], "endpoints": [{"id": "a", "command": "x"}, {"id": "b", "command": ["y", "z"]}]},
    )
    faults = write(tmp_path / "faults", {"rules": [{"kind": "drop", "rate": 0.1}]})
    settings, _ = cli.read_settings(["--config", config, "--faults", faults, "--seed", "7", "--port", "0"])
    assert [(endpoint.id, endpoint.command) for endpoint in settings.endpoints] == [("a", ("x",)), ("b", ("y", "z"))]
    assert (settings.faults.seed, settings.faults.rules[0].rate, settings.port) == (7, 0.1, 0)


def test_tls_can_be_enabled_by_option_and_by_file(tmp_path: Path) -> None:
    assert cli.read_settings(["--command", "x", "--tls"])[0].tls
    config = write(tmp_path / "config", {"tls": True, "endpoints": [{"command": "x"}]})
    assert cli.read_settings(["--config", config])[0].tls


@pytest.mark.parametrize("host", ["::1", "::"])
def test_the_url_of_an_ipv6_address_has_brackets(host: str) -> None:
    emulator = Emulator(EmulatorSettings(host=host, port=0))
    emulator._socket.close()
    assert re.fullmatch(r"http://\[::1\]:\d+", emulator.url)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--command", "x", "--workers-min", "3"], "workersMin=3 exceeds workersMax=2"),
        (["--command", "x", "--endpoint", "no/slash"], "endpoints.0.id"),
        (["--command", "x", "--env", "NOVALUE"], "NAME=VALUE"),
        (["--command", "x", "--env", "RUNPOD_INIT_TIMEOUT=soon"], "RUNPOD_INIT_TIMEOUT='soon': expected an integer"),
        (["--command", "x", "--env", f"RUNPOD_INIT_TIMEOUT={'9' * 5000}"], "expected an integer"),
        (["--command", "x", "--scaler-value", "0"], "scalerValue"),
        (["--command", "x", "--lost-after", "10"], "lostAfter=10 (seconds) must exceed pingInterval=10000"),
        (["--config", "/no/such/file"], "cannot read /no/such/file: No such file or directory"),
        (["--config", __file__], "is not JSON"),
        (["--faults", "/no/such/file", "--command", "x"], "cannot read /no/such/file"),
    ],
)
def test_an_invalid_setting_is_reported_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_endpoint_options_are_rejected_with_a_config_file(tmp_path: Path) -> None:
    config = write(tmp_path / "config", {"endpoints": [{"id": "a"}]})
    with pytest.raises(SettingsError, match="remove the options for workersMin"):
        cli.read_settings(["--config", config, "--workers-min", "1"])


def test_invalid_faults_in_a_config_file_are_rejected_with_a_seed_too(tmp_path: Path) -> None:
    config = write(tmp_path / "config", {"faults": []})
    with pytest.raises(SettingsError, match="faults"):
        cli.read_settings(["--config", config, "--seed", "1"])


def test_an_unknown_option_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--no-such-option"])
    assert caught.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_help_lists_every_option_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    assert all(option in help_text for option in cli._ENDPOINT_OPTIONS)


def test_endpoints_with_the_same_id_are_rejected() -> None:
    with pytest.raises(SettingsError, match="must be unique: a, a"):
        Emulator(EmulatorSettings.model_validate({"port": 0, "endpoints": [{"id": "a"}, {"id": "a"}]}))


def test_a_port_in_use_is_reported() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            Emulator(EmulatorSettings(port=port))


def test_a_port_of_an_emulator_that_does_not_serve_yet_is_in_use() -> None:
    first = Emulator(EmulatorSettings(port=0))
    with first._socket, pytest.raises(SettingsError, match="Address already in use"):
        Emulator(EmulatorSettings(port=first._socket.getsockname()[1]))


def test_every_option_of_spirit_sets_its_setting(capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "--heartbeat-interval": ("2", "heartbeat_interval_s", 2),
        "--sync-ttl": ("3", "sync_ttl_s", 3),
        "--async-ttl": ("4", "async_ttl_s", 4),
        "--first-byte": ("5", "first_byte_s", 5),
        "--transfer": ("6", "transfer_s", 6),
    }
    argv = ["--platform", "spirit", "--command", "x", "--scaler-type", "QUEUE_LENGTH", "--max-retries", "0"]
    for option, (text, _, _) in options.items():
        argv += [option, text]
    argv += ["--agent-port", "8087", "--agent-port", "0", "--accept-bearer", "--answer-early"]
    settings, _ = cli.read_settings(argv)
    (endpoint,) = settings.endpoints
    assert isinstance(endpoint, SpiritEndpointSettings)
    assert {name: getattr(endpoint, name) for _, name, _ in options.values()} == {
        name: value for _, name, value in options.values()
    }
    assert options.keys() == cli._SPIRIT_OPTIONS.keys()
    assert (endpoint.agent_ports, endpoint.accept_bearer, endpoint.answer_early) == ((8087, 0), True, True)
    assert (endpoint.scaler_type, endpoint.max_retries) == ("QUEUE_LENGTH", 0)
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    help_text = capsys.readouterr().out
    assert all(option in help_text for option in cli._SPIRIT_OPTIONS)


def test_every_option_of_a_load_balancing_endpoint_sets_its_setting() -> None:
    options = {
        "--balancer-port": ("8001", "port", 8001),
        "--health-interval": ("0.5", "health_interval_s", 0.5),
        "--no-worker": ("3", "no_worker_s", 3),
        "--request-timeout": ("4", "request_timeout_s", 4),
        "--affinity-wait": ("5", "affinity_wait_s", 5),
    }
    argv = ["--endpoint-type", "load-balancer", "--command", "x", "--env", "HEALTH_CHECK_PATH=/up"]
    for option, (text, _, _) in options.items():
        argv += [option, text]
    (endpoint,) = cli.read_settings(argv)[0].endpoints
    assert isinstance(endpoint, BalancerSettings)
    assert {name: getattr(endpoint, name) for _, name, _ in options.values()} == {
        name: value for _, name, value in options.values()
    }
    assert options.keys() == cli._BALANCER_OPTIONS.keys()
    assert (endpoint.scaler_type, endpoint.health_check_path) == ("REQUEST_COUNT", "/up")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--endpoint-type", "load-balancer", "--command", "x", "--long-poll", "5"], "longPoll: Extra inputs"),
        (["--endpoint-type", "load-balancer", "--command", "x", "--scaler-type", "QUEUE_DELAY"], "scalerType"),
        (["--command", "x", "--no-worker", "5"], "noWorker: Extra inputs"),
    ],
)
def test_a_setting_of_the_other_type_of_endpoint_is_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 1
    assert message in capsys.readouterr().err


def test_a_balancers_port_in_use_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        argv = ["--endpoint-type", "load-balancer", "--command", "x", "--port", "0", "--balancer-port", port]
        assert cli.main(argv) == 1
    assert f"endpoint local cannot listen on port {port}: Address already in use" in capsys.readouterr().err


def test_spirits_limits_are_the_documented_ones_unless_a_file_has_others(tmp_path: Path) -> None:
    endpoint = SpiritEndpointSettings()
    assert (endpoint.sync_ttl_s, endpoint.async_ttl_s) == (3 * 60, 15 * 60)
    assert (endpoint.first_byte_s, endpoint.transfer_s) == (3 * 60, 3 * 60)
    assert (endpoint.max_body_bytes, endpoint.retention_s) == (20 * 2**20, 30 * 60)
    assert (endpoint.max_sync_result_bytes, endpoint.max_async_result_bytes) == (10 * 2**20, 2 * 2**20)
    config = write(tmp_path / "config", {"platform": "spirit", "endpoints": [{"id": "a", "maxBody": 5}]})
    (changed,) = cli.read_settings(["--config", config])[0].endpoints
    assert isinstance(changed, SpiritEndpointSettings)
    assert changed.max_body_bytes == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--platform", "spirit", "--command", "x", "--ping-interval", "2000"], "pingInterval: Extra inputs"),
        (
            ["--platform", "spirit", "--command", "x", "--lost-after", "5"],
            "lostAfter=5 must exceed heartbeatInterval",
        ),
        (["--platform", "spirit", "--command", "x", "--scaler-type", "REQUEST_COUNT"], "scalerType"),
        (["--platform", "spirit", "--command", "x", "--async-ttl", "86400"], "asyncTtl"),
        (["--command", "x", "--scaler-type", "QUEUE_LENGTH"], "scalerType"),
        (["--command", "x", "--sync-ttl", "5"], "syncTtl: Extra inputs"),
        (["--platform", "spirit", "--agent-port", "70000"], "agentPorts.0: Input should be less than"),
    ],
)
def test_a_setting_of_the_other_platform_is_refused_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_fault_of_the_other_platform_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = write(tmp_path / "faults", {"rules": [{"kind": "error", "route": "heartbeat"}]})
    assert cli.main(["--command", "x", "--port", "0", "--faults", faults]) == 1
    assert "the platform has no route heartbeat; it has balancer, cancel, control-plane," in capsys.readouterr().err


def test_an_agents_port_in_use_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["--platform", "spirit", "--port", "0", "--agent-port", str(port)]) == 1
    assert f"no agent can listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
