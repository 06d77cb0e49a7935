"""The command line: `python -m emulator`.

Exit codes: 0 ended by SIGINT or SIGTERM, 1 it cannot start (one line on stderr says why), 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from pydantic import ValidationError

from emulator.api.auth import faults_in
from emulator.app import Emulator, EmulatorSettings
from emulator.errors import ConfigurationError

_HANDLER = Path(__file__).parent.parent / "handler.py"
# What the tiny model is called, and how it is led to call tools.
_TINY_SETTINGS = {"SERVED_MODEL_NAME": "tiny", "TOOL_CALL_PARSER": "hermes", "ENABLE_AUTO_TOOL_CHOICE": "true"}
# An option for each of these settings of an endpoint: the option, the setting, its type.
_ENDPOINT_OPTIONS: dict[str, tuple[str, type]] = {
    "--workers-min": ("workersMin", int),
    "--workers-max": ("workersMax", int),
    "--scaler-type": ("scalerType", str),
    "--scaler-value": ("scalerValue", float),
    "--idle-timeout": ("idleTimeout", float),
    "--execution-timeout-ms": ("executionTimeoutMs", float),
    "--init-timeout": ("initTimeout", float),
    "--grace": ("grace", float),
    "--long-poll": ("longPoll", float),
    "--ping-interval": ("pingInterval", int),
    "--lost-after": ("lostAfter", float),
    "--max-retries": ("maxRetries", int),
}


def parser() -> argparse.ArgumentParser:
    """The command line's parser; what an endpoint's options mean stands where its settings are declared."""
    from emulator.settings import EndpointSettings

    result = argparse.ArgumentParser(
        prog="python -m emulator",
        description="The serverless platform on this machine: its APIs, its queue, and workers that are started and "
        "stopped as the queue asks. For development and tests.",
        epilog="Without --command, a worker is this repository's handler.py with the tiny model. "
        "With --config, endpoints come from a JSON file: "
        '{"apiKeys": ["..."], "endpoints": [{"id": "...", "command": "...", "workersMax": 2}]}.',
    )
    result.add_argument("--host", default=None, help="address to listen on (default: 127.0.0.1)")
    result.add_argument("--port", type=int, default=None, help="port to listen on, 0 for a free one (default: 8000)")
    result.add_argument("--tls", action="store_true", help="serve over HTTPS, with a certificate that is made for it")
    result.add_argument(
        "--api-key", action="append", metavar="KEY", help="a key that clients may use; may be repeated (default: local)"
    )
    result.add_argument("--config", type=Path, metavar="FILE", help="all settings as JSON; the options above add to it")
    result.add_argument("--faults", type=Path, metavar="FILE", help="faults as JSON, as PUT /faults takes them")
    result.add_argument("--seed", type=int, help="seed of the faults (default: 0)")
    result.add_argument("--quiet", action="store_true", help="do not show workers' log lines")
    group = result.add_argument_group("the endpoint")
    group.add_argument("--endpoint", metavar="ID", help="its id (default: local)")
    group.add_argument("--command", help="what a worker runs, as one would type it")
    group.add_argument("--env", action="append", metavar="NAME=VALUE", help="a variable for workers; may be repeated")
    group.add_argument("--no-rate-limits", action="store_true", help="let clients ask as often as they like")
    by_alias = {field.alias: (name, field) for name, field in EndpointSettings.model_fields.items()}
    for option, (alias, kind) in _ENDPOINT_OPTIONS.items():
        _, field = by_alias[alias]
        shown = f"{field.description} (default: {field.default})"
        if alias == "scalerType":
            group.add_argument(option, dest=alias, choices=["QUEUE_DELAY", "REQUEST_COUNT"], help=shown)
        else:
            group.add_argument(option, dest=alias, type=kind, metavar="N", help=shown)
    return result


def read_settings(argv: Sequence[str] | None) -> tuple[EmulatorSettings, bool]:
    """The settings that a command line asks for, and whether workers' log lines stay unseen.

    Raises:
        ConfigurationError: a file cannot be read, or a value is not allowed.
    """
    given = parser().parse_args(argv)
    document: dict[str, Any] = _read(given.config) if given.config else {}
    endpoint = {alias: getattr(given, alias) for alias, _ in _ENDPOINT_OPTIONS.values()}
    endpoint |= {"id": given.endpoint, "command": given.command, "env": _variables(given.env)}
    endpoint |= {"rateLimits": False if given.no_rate_limits else None}
    endpoint = {name: value for name, value in endpoint.items() if value is not None}
    if given.config and endpoint:
        raise ConfigurationError(f"with --config, endpoints come from the file alone: leave out {', '.join(endpoint)}")
    if not given.config:
        document["endpoints"] = [endpoint if "command" in endpoint else _own_worker(endpoint)]
    if given.faults:
        document["faults"] = _read(given.faults)
    if given.seed is not None:
        document.setdefault("faults", {})["seed"] = given.seed
    document |= {
        name: value
        for name, value in (("host", given.host), ("port", given.port), ("apiKeys", given.api_key))
        if value is not None
    }
    if given.tls:
        document["tls"] = True
    try:
        return EmulatorSettings.model_validate(document), given.quiet
    except ValidationError as error:
        raise ConfigurationError(faults_in(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the emulator until SIGINT or SIGTERM; return the exit code."""
    try:
        settings, quiet = read_settings(argv)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(settings, quiet=quiet))
    except ConfigurationError as error:
        sys.stderr.write(f"The emulator cannot start. {error}\n")
        return 1


async def _run(settings: EmulatorSettings, *, quiet: bool) -> int:
    def announce(endpoint: str, line: str) -> None:
        _say(f"{endpoint}: {line}")

    def log(worker: str, line: str) -> None:
        if not quiet:
            _say(f"{worker} | {line}")

    emulator = Emulator(settings, announce, log)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, emulator.stop)

    def ready() -> None:
        _say(f"The emulator listens on {emulator.url}")
        if emulator.ca_file is not None:
            _say(f"Clients trust it by its CA file: curl --cacert {emulator.ca_file} {emulator.url}")
        keys = "key: local" if settings.api_keys == ("local",) else f"{len(settings.api_keys)} API key(s)"
        for endpoint in settings.endpoints:
            _say(f"OpenAI base URL of {endpoint.id}: {emulator.url}/v2/{endpoint.id}/openai/v1 ({keys})")

    await emulator.run(ready)
    return 0


def _say(line: str) -> None:
    """A line at once, for whoever waits for it at the other end of a pipe."""
    # Who has closed the other end wants no lines, but may still want the emulator.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def _own_worker(endpoint: dict[str, Any]) -> dict[str, Any]:
    """The endpoint with this repository's worker.

    Its model is the tiny one, unless MODEL_NAME names another, or this is an image, which says by BAKED_MODEL_DIR where
    its own is. The settings of the tiny model are as in the image that holds it, where nothing else is asked for.
    """
    env = dict(endpoint.get("env", {}))
    given = {name for name, value in {**os.environ, **env}.items() if value}
    if not {"MODEL_NAME", "BAKED_MODEL_DIR"} & given:
        env["MODEL_NAME"] = _tiny_model()
        env |= {name: value for name, value in _TINY_SETTINGS.items() if name not in given}
    return {**endpoint, "env": env, "command": [sys.executable, str(_HANDLER)], "cwd": str(_HANDLER.parent)}


def _tiny_model() -> str:
    """The directory of the tiny model, trained first where it is not there yet."""
    _say("Looking for the tiny model; the first time, it is trained for about a minute")
    made = subprocess.run(
        [sys.executable, "-m", "builder", "tiny"], cwd=_HANDLER.parent, stdout=subprocess.PIPE, text=True, check=False
    )
    if made.returncode != 0:
        raise ConfigurationError("the tiny model cannot be made; give another by MODEL_NAME, or a --command")
    return made.stdout.strip()


def _variables(pairs: list[str] | None) -> dict[str, str] | None:
    if pairs is None:
        return None
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise ConfigurationError(f"--env takes NAME=VALUE; {len(wrong)} of {len(pairs)} have no '='")
    return dict(pair.split("=", 1) for pair in pairs)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{path} does not hold a JSON object")
    return document
