"""The command line: `python -m emulator`.

Exit codes: 0 after SIGINT or SIGTERM, 1 if it cannot start (a line on stderr says why), 2 for an invalid command line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import uvloop
from pydantic import ValidationError

from emulator.api.bodies import describe_validation_error
from emulator.app import Emulator
from emulator.balancer.endpoint import BalancerEndpoint
from emulator.control_plane.settings import OF_REQUESTS
from emulator.control_plane.stand_in import TINY_MODEL_VARIABLES
from emulator.errors import SettingsError
from emulator.settings import BalancerSettings, EmulatorSettings, EndpointSettings, ScalerType
from emulator.spirit.settings import SpiritEmulatorSettings, SpiritEndpointSettings

_HANDLER = Path(__file__).parent.parent / "handler.py"
# Settings of an endpoint that have an option: the option, the setting's alias, its type.
_ENDPOINT_OPTIONS: dict[str, tuple[str, type]] = {
    "--workers-min": ("workersMin", int),
    "--workers-max": ("workersMax", int),
    "--scaler-type": ("scalerType", str),
    "--scaler-value": ("scalerValue", float),
    "--idle-timeout": ("idleTimeout", float),
    "--frozen-timeout": ("frozenTimeout", float),
    "--execution-timeout-ms": ("executionTimeoutMs", float),
    "--init-timeout": ("initTimeout", float),
    "--grace": ("grace", float),
    "--long-poll": ("longPoll", float),
    "--ping-interval": ("pingInterval", int),
    "--lost-after": ("lostAfter", float),
    "--max-retries": ("maxRetries", int),
}
# Those that only load-balancing endpoints have.
_BALANCER_OPTIONS: dict[str, tuple[str, type]] = {
    "--balancer-port": ("balancerPort", int),
    "--health-interval": ("healthInterval", float),
    "--no-worker": ("noWorker", float),
    "--request-timeout": ("requestTimeout", float),
    "--affinity-wait": ("affinityWait", float),
}
# Those that only Spirit has. The options of RunPod's that it does not have are refused with the settings.
_SPIRIT_OPTIONS: dict[str, tuple[str, type]] = {
    "--heartbeat-interval": ("heartbeatInterval", int),
    "--sync-ttl": ("syncTtl", float),
    "--async-ttl": ("asyncTtl", float),
    "--first-byte": ("firstByte", float),
    "--transfer": ("transfer", float),
}
_SETTINGS: dict[str, type[EmulatorSettings | SpiritEmulatorSettings]] = {
    "runpod": EmulatorSettings,
    "spirit": SpiritEmulatorSettings,
}


def parser() -> argparse.ArgumentParser:
    """Return the parser; the help of an endpoint's options is the description of its settings."""
    result = argparse.ArgumentParser(
        prog="python -m emulator",
        description="Emulate the serverless platform on this machine: its APIs, its queue, and workers that are "
        "started and stopped with the load. For development and tests.",
        epilog="Without --command, workers run this repository's handler.py with the tiny model. "
        "With --config, the endpoints are defined in a JSON file: "
        '{"apiKeys": ["..."], "endpoints": [{"id": "...", "command": "...", "workersMax": 2}]}.',
    )
    result.add_argument("--platform", choices=list(_SETTINGS), help="platform to emulate (default: runpod)")
    result.add_argument(
        "--host",
        default=None,
        help="address to listen on; do not expose the emulator to a network that you do not trust (default: 127.0.0.1)",
    )
    result.add_argument("--port", type=int, default=None, help="port to listen on; 0: any free port (default: 8000)")
    result.add_argument("--tls", action="store_true", help="serve over HTTPS, with a certificate generated at startup")
    result.add_argument(
        "--api-key", action="append", metavar="KEY", help="API key of clients; may be repeated (default: local)"
    )
    result.add_argument(
        "--config", type=Path, metavar="FILE", help="all settings as JSON; the options above override it"
    )
    result.add_argument("--faults", type=Path, metavar="FILE", help="faults as JSON, in the format of PUT /faults")
    result.add_argument("--seed", type=int, help="random seed of the faults (default: 0)")
    result.add_argument(
        "--no-endpoint",
        action="store_true",
        help="start without an endpoint; the options of one are then for those that POST /v2/serverless creates",
    )
    result.add_argument(
        "--load-models",
        action="store_true",
        help="created endpoints load the model that they ask for (default, unless MODEL_NAME is set: the tiny model "
        "answers under its name)",
    )
    result.add_argument("--quiet", action="store_true", help="do not print workers' log lines")
    group = result.add_argument_group("endpoint")
    group.add_argument("--endpoint", metavar="ID", help="endpoint id (default: local)")
    group.add_argument("--command", help="command that a worker runs, in shell syntax")
    group.add_argument(
        "--env", action="append", metavar="NAME=VALUE", help="environment variable for workers; may be repeated"
    )
    group.add_argument("--no-rate-limits", action="store_true", help="do not enforce the documented rate limits")
    flashboot = EndpointSettings.model_fields["flashboot"].description
    group.add_argument("--flashboot", action="store_const", const=True, help=flashboot)
    fields = {field.alias: field for field in EndpointSettings.model_fields.values()}
    for option, (alias, kind) in _ENDPOINT_OPTIONS.items():
        text = f"{fields[alias].description} (default: {fields[alias].default})"
        if alias == "scalerType":
            group.add_argument(option, dest=alias, choices=get_args(ScalerType), help=text)
        else:
            group.add_argument(option, dest=alias, type=kind, metavar="N", help=text)
    balancer = result.add_argument_group("load-balancing endpoint")
    balancer.add_argument(
        "--endpoint-type",
        dest="type",
        choices=["queue", "load-balancer"],
        help="kind of RunPod endpoint; a load-balancing one has a URL of its own (default: queue)",
    )
    fields = {field.alias: field for field in BalancerSettings.model_fields.values()}
    for option, (alias, kind) in _BALANCER_OPTIONS.items():
        text = f"{fields[alias].description} (default: {fields[alias].default})"
        balancer.add_argument(option, dest=alias, type=kind, metavar="N", help=text)
    spirit = result.add_argument_group("endpoint on Spirit")
    fields = {field.alias: field for field in SpiritEndpointSettings.model_fields.values()}
    for option, (alias, kind) in _SPIRIT_OPTIONS.items():
        text = f"{fields[alias].description} (default: {fields[alias].default})"
        spirit.add_argument(option, dest=alias, type=kind, metavar="N", help=text)
    text = f"{fields['agentPorts'].description}; may be repeated"
    spirit.add_argument("--agent-port", dest="agentPorts", type=int, action="append", metavar="PORT", help=text)
    for option, alias in (("--accept-bearer", "acceptBearer"), ("--answer-early", "answerEarly")):
        text = str(fields[alias].description)
        spirit.add_argument(option, dest=alias, action="store_const", const=True, help=text)
    return result


def read_settings(argv: Sequence[str] | None) -> tuple[EmulatorSettings | SpiritEmulatorSettings, bool]:
    """Return the settings of a command line, and whether workers' log lines are not printed.

    Raises:
        SettingsError: a file cannot be read, or a value is invalid.
    """
    args = parser().parse_args(argv)
    document: dict[str, Any] = _read_json(args.config) if args.config else _endpoints(args)
    given = [*_endpoint(args), *(name for name in ("no_endpoint", "load_models") if getattr(args, name))]
    if args.config and given:
        raise SettingsError(f"--config defines the endpoints; remove the options for {', '.join(given)}")
    if args.faults:
        document["faults"] = _read_json(args.faults)
    if args.seed is not None:
        faults = document.setdefault("faults", {})
        if isinstance(faults, dict):  # Otherwise, the validation rejects it.
            faults["seed"] = args.seed
    document |= {
        name: value
        for name, value in (("host", args.host), ("port", args.port), ("apiKeys", args.api_key))
        if value is not None
    }
    if args.tls:
        document["tls"] = True
    if args.platform:
        document["platform"] = args.platform
    model = _SETTINGS.get(str(document.get("platform")), EmulatorSettings)
    try:
        return model.model_validate(document), args.quiet
    except ValidationError as error:
        raise SettingsError(describe_validation_error(error)) from None


def _endpoint(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of an endpoint that the options give."""
    options = _ENDPOINT_OPTIONS | _BALANCER_OPTIONS | _SPIRIT_OPTIONS
    aliases = [alias for alias, _ in options.values()]
    aliases += ["flashboot", "agentPorts", "acceptBearer", "answerEarly"]
    endpoint = {alias: getattr(args, alias) for alias in aliases}
    endpoint |= {"id": args.endpoint, "command": args.command, "env": _parse_env(args.env)}
    endpoint |= {"rateLimits": False if args.no_rate_limits else None}
    endpoint |= {"type": args.type and args.type.replace("-", "_").upper()}
    return {name: value for name, value in endpoint.items() if value is not None}


def _endpoints(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the first endpoint, and of those that the control plane creates."""
    endpoint = _endpoint(args)
    own_worker = {"command", "agentPorts"} & endpoint.keys()
    document: dict[str, Any] = {"endpoints": []}
    if not args.no_endpoint:
        document["endpoints"] = [endpoint if own_worker else with_default_worker(endpoint)]
    if args.platform != "spirit":
        document["controlPlane"] = _control_plane(endpoint, load_models=args.load_models)
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Run the emulator until SIGINT or SIGTERM; return the exit code."""
    try:
        settings, quiet = read_settings(argv)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(settings, quiet=quiet))
    except SettingsError as error:
        sys.stderr.write(f"The emulator cannot start: {error}\n")
        return 1


async def _run(settings: EmulatorSettings | SpiritEmulatorSettings, *, quiet: bool) -> int:
    def event_log(endpoint: str, line: str) -> None:
        _print_line(f"{endpoint}: {line}")

    def worker_log(worker: str, line: str) -> None:
        if not quiet:
            _print_line(f"{worker} | {line}")

    emulator = Emulator(settings, event_log, worker_log)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, emulator.stop)

    def on_ready() -> None:
        _print_line(f"The emulator listens on {emulator.url}")
        if emulator.ca_file is not None:
            _print_line(f"CA file that clients must trust: curl --cacert {emulator.ca_file} {emulator.url}")
        keys = "key: local" if settings.api_keys == ("local",) else f"{len(settings.api_keys)} API key(s)"
        for endpoint in emulator.endpoints.values():
            name, path = endpoint.settings.id, endpoint.page_document()["openaiPath"]
            base = endpoint.url + "/v1" if isinstance(endpoint, BalancerEndpoint) else f"{emulator.url}{path}"
            _print_line(f"OpenAI base URL of {name}: {base} ({keys})")
            if isinstance(settings, SpiritEmulatorSettings):
                _print_line(f"Its requests have the header 'Authorization: {name}-KEY', without Bearer")
            for worker, url in emulator.agents.urls(name).items():
                _print_line(f"Agent of worker {worker}: EASE_AGENT_URL={url}")

    await emulator.run(on_ready)
    return 0


def _print_line(line: str) -> None:
    """Print a line and flush it, for readers of a pipe."""
    # Go on if the reader has closed the pipe: clients may still use the emulator.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def with_default_worker(endpoint: dict[str, Any]) -> dict[str, Any]:
    """Return an endpoint's document with this repository's worker as its command.

    The model is MODEL_NAME, or the image's model (BAKED_MODEL_DIR), or else the tiny model. The tiny model gets the
    same settings as in its image, unless they are set.
    """
    env = dict(endpoint.get("env", {}))
    configured = {name for name, value in {**os.environ, **env}.items() if value}
    if not _has_model(env):
        env["MODEL_NAME"] = _tiny_model_dir()
        env |= {name: value for name, value in TINY_MODEL_VARIABLES.items() if name not in configured}
    return {**endpoint, "env": env, "command": [sys.executable, str(_HANDLER)], "cwd": str(_HANDLER.parent)}


def _control_plane(endpoint: dict[str, Any], *, load_models: bool) -> dict[str, Any]:
    """Return the settings of the control plane, whose endpoints have the same options and the same worker."""
    base = {name: value for name, value in endpoint.items() if name not in OF_REQUESTS}
    limits = {} if endpoint.get("rateLimits", True) else {"rateLimits": None}
    if "command" in base:
        return {**limits, "endpoint": base}
    base |= {"command": [sys.executable, str(_HANDLER)], "cwd": str(_HANDLER.parent)}
    stand_in = {} if load_models or _has_model(endpoint.get("env", {})) else {"modelDir": _tiny_model_dir()}
    return {**limits, "endpoint": base, **stand_in}


def _has_model(env: Mapping[str, str]) -> bool:
    """Return whether the environment, or these variables over it, name a model."""
    variables = {**os.environ, **env}
    return any(variables.get(name) for name in ("MODEL_NAME", "BAKED_MODEL_DIR"))


@functools.cache
def _tiny_model_dir() -> str:
    """Return the directory of the tiny model, which is trained first if it does not exist."""
    _print_line("Looking for the tiny model; the first time, it is trained for about a minute")
    trained = subprocess.run(
        [sys.executable, "-m", "builder", "tiny"], cwd=_HANDLER.parent, stdout=subprocess.PIPE, text=True, check=False
    )
    if trained.returncode != 0:
        raise SettingsError("the tiny model cannot be trained; set MODEL_NAME or --command")
    return trained.stdout.strip()


def _parse_env(pairs: list[str] | None) -> dict[str, str] | None:
    if pairs is None:
        return None
    # A pair without a name may be a secret value: do not print it.
    invalid = sum("=" not in pair for pair in pairs)
    if invalid:
        raise SettingsError(f"--env expects NAME=VALUE; {invalid} of {len(pairs)} have no '='")
    return dict(pair.split("=", 1) for pair in pairs)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise SettingsError(f"{path} is not a JSON object")
    return document
