"""The worker's settings, as the worker itself reads them: `handler.py --print-config` in a subprocess."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from builder.doctor import gpus

_HANDLER = Path(__file__).resolve().parents[2] / "handler.py"
# The worker makes the tiny model if no model is named.
_PLACEHOLDER = "no/model"
_TIMEOUT_S = 120
_LINE = re.compile(r"(?P<name>[A-Z0-9_]+)=(?P<value>.*)  \((?P<source>.*)\)")


@dataclass(frozen=True)
class WorkerConfig:
    """The worker's settings.

    Attributes:
        values: the settings that are not defaults, by the names of their variables.
        baked_model: where an image has its model.
        warnings: unknown names and invalid values, a line each.
        queried: whether the worker printed its settings; if not, the values are those of the environment.
    """

    values: Mapping[str, str]
    baked_model: Path | None = None
    warnings: tuple[str, ...] = ()
    queried: bool = True

    @property
    def model(self) -> str | None:
        """The model that the worker would serve; None for the tiny model."""
        if model := self.values.get("MODEL"):
            return model
        has_model = self.baked_model is not None and (self.baked_model / "config.json").is_file()
        return str(self.baked_model) if has_model else None

    @property
    def revision(self) -> str | None:
        """The revision of that model; None for the main branch."""
        return self.values.get("REVISION") or self.values.get("MODEL_REVISION")


def query_worker(model: str | None, environment: Mapping[str, str]) -> WorkerConfig:
    """Ask the worker for its settings and its warnings about them.

    Args:
        model: overrides the environment's.
        environment: the worker's variables.
    """
    from_environment = {name: value.strip() for name, value in environment.items() if value.strip()}
    named = model or from_environment.get("MODEL") or from_environment.get("MODEL_NAME")
    if named and not model:
        from_environment["MODEL"] = named
    not_queried = WorkerConfig(from_environment, _path(from_environment.get("BAKED_MODEL_DIR")), queried=False)
    if importlib.util.find_spec("vllm") is None:
        return not_queried
    try:
        done = subprocess.run(
            [sys.executable, str(_HANDLER), "--print-config"],
            env={name: value for name, value in environment.items() if name != "MODEL"}
            | {"MODEL_NAME": named or _PLACEHOLDER},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return replace(not_queried, warnings=(f"the worker did not print its settings within {_TIMEOUT_S} s",))
    log = [line for line in done.stderr.splitlines() if line.strip()]
    settings = [match for line in done.stdout.splitlines() if (match := _LINE.fullmatch(line))]
    if done.returncode and not settings:
        errors = tuple(line for line in log if not line.startswith("INFO"))
        return replace(not_queried, warnings=errors or ("the worker failed without a message",))
    values = {match["name"]: match["value"] for match in settings if "default" not in match["source"]}
    path = values.get("MODEL", "")
    if _PLACEHOLDER.replace("/", "--") in path:
        del values["MODEL"]
    elif named and not Path(path).is_dir():  # the path to which the worker would download the model
        values["MODEL"] = named
    baked_model = next((match["value"] for match in settings if match["name"] == "BAKED_MODEL_DIR"), None)
    warnings = [line.partition("|")[2].strip() for line in log if re.match(r"(WARNING|ERROR) *\|", line)]
    if done.returncode and gpus.local_gpu() is not None:  # without a GPU, vLLM rejects settings that need one
        warnings.append(log[-1])
    return WorkerConfig(values, _path(baked_model), tuple(warnings))


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None
