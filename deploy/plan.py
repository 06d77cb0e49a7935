"""From options, model and GPUs to the requests of the API: what is created, and what is changed of an endpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy import environment
from deploy.errors import OptionError
from deploy.gpus import Choice
from deploy.options import LOAD_BALANCER, QUEUE, Options
from runpod_api.models import Endpoint

# vLLM 0.32's wheels are built with CUDA 13.
MIN_CUDA = "13.0"
EXECUTION_TIMEOUT_S = 600.0
_WORKERS = {"min": 0, "max": 3}
_IDLE_TIMEOUT_S = 60
_FLASHBOOT = "FLASHBOOT"
_SCALING = {"type": "REQUEST_COUNT", "requestCount": 16}
# Room for what vLLM compiles, logs and temporary files.
_DISK_GB = 20
_PORT = "8080"
_PORTS = ("PORT", "PORT_HEALTH")
# "If your worker's cold start time exceeds the default 7-minute limit, the system may mark it as unhealthy."
_INIT_TIMEOUT, _INIT_TIMEOUT_S = "RUNPOD_INIT_TIMEOUT", 420
_START_S = 240
_DOWNLOAD_BYTES_PER_S = 125_000_000


def min_cuda(options: Options) -> str:
    """Return the CUDA version that workers' machines need at least."""
    return options.min_cuda or MIN_CUDA


def endpoint_name(model: str) -> str:
    """Return the name of an endpoint for a model: the last part of its id or path, in lower case."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(model.rstrip("/")).name.lower()).strip("-.") or "model"


def variables(model: str, options: Options, kind: str, count: int, download_bytes: int | None) -> dict[str, str]:
    """Return the worker's variables: those that follow from the model and other options, under the user's own.

    Args:
        model: hub id or directory.
        options: what is asked for.
        kind: `QUEUE` or `LOAD_BALANCER`.
        count: of GPUs.
        download_bytes: that a worker downloads at its start at most; None if not known.
    """
    made = {"MODEL_NAME": model}
    if (options.flashboot or _FLASHBOOT) != "OFF":
        made["WARM_UP"] = "true"  # FlashBoot keeps what a first request has compiled
    if count > 1:
        made["TENSOR_PARALLEL_SIZE"] = str(count)
    if kind == LOAD_BALANCER:
        port = (options.env or {}).get("PORT", _PORT)
        made |= {"ENDPOINT_TYPE": "load_balancer", "PORT": port, "PORT_HEALTH": port}
    if options.execution_timeout_s is not None:
        made["DELIVERY_TIMEOUT_S"] = f"{options.execution_timeout_s:g}"
    init_s = _START_S + math.ceil((download_bytes or 0) / _DOWNLOAD_BYTES_PER_S)
    if init_s > _INIT_TIMEOUT_S:
        made[_INIT_TIMEOUT] = str(init_s)
    return {**made, **(options.env or {})}


def disk_gb(download_bytes: int | None, *, on_volume: bool) -> int:
    """Return the size of the container's disk: with room for the model, unless a volume takes it."""
    model_gb = 0 if on_volume else math.ceil((download_bytes or 0) * 1.1 / 1e9)
    return _DISK_GB + 5 * math.ceil(model_gb / 5)


def create_request(
    name: str, model: str, options: Options, choice: Choice | None, download_bytes: int | None
) -> dict[str, Any]:
    """Return the body of the request that creates an endpoint.

    Args:
        name: of the endpoint.
        model: hub id or directory.
        options: what is asked for.
        choice: GPUs; None where they are not known yet, in a dry run.
        download_bytes: that a worker downloads at its start at most; None if not known.

    Raises:
        OptionError: options exclude each other.
    """
    given = options.fields()
    kind = options.type or QUEUE
    scaling = given.get("scaling", _SCALING)
    if kind == LOAD_BALANCER and scaling["type"] == "QUEUE_DELAY":
        raise OptionError("--queue-delay is for --type queue: a load-balancing endpoint has no queue")
    workers = {**_WORKERS, **given.get("workers", {})}
    _check_workers(workers)
    if not _has_idle_timeout(kind, scaling):
        if "idleTimeout" in workers:
            raise OptionError("--idle-timeout is not for queues that scale by requests: give --queue-delay as well")
    else:
        workers.setdefault("idleTimeout", _IDLE_TIMEOUT_S)
    gpu: dict[str, Any] = {"minCudaVersion": MIN_CUDA, **given.get("gpu", {})}
    if choice is not None:
        gpu |= {"pools": choice.pool_ids, "count": choice.count}
        if choice.excluded:
            gpu["excludedTypes"] = choice.excluded
    env = variables(model, options, kind, gpu.get("count", 1), download_bytes)
    return {
        "name": name,
        "type": kind,
        "image": options.image,
        "disk": disk_gb(download_bytes, on_volume=bool(options.volumes)),
        "env": env,
        "flashboot": _FLASHBOOT,
        "timeout": round(EXECUTION_TIMEOUT_S * 1000),
        **given,
        **({"ports": sorted({f"{env[name]}/http" for name in _PORTS})} if kind == LOAD_BALANCER else {}),
        "gpu": gpu,
        "workers": workers,
        "scaling": scaling,
    }


def with_places(options: Options, endpoint: Endpoint) -> Options:
    """Return the options with the volumes and data centers that an endpoint has, and keeps if none are given."""
    return replace(
        options,
        volumes=tuple(endpoint.network_volumes) if options.volumes is None else options.volumes,
        data_centers=tuple(endpoint.data_center_ids) if options.data_centers is None else options.data_centers,
    )


def keep_size(body: dict[str, Any], endpoint: Endpoint, options: Options) -> None:
    """Leave what follows from the model's size as the endpoint has it: that size is not known without the doctor."""
    if options.disk_gb is None and endpoint.disk is not None:
        body["disk"] = endpoint.disk
    if _INIT_TIMEOUT in (endpoint.env or {}):
        body["env"].setdefault(_INIT_TIMEOUT, (endpoint.env or {})[_INIT_TIMEOUT])


def _has_idle_timeout(kind: str | None, scaling: Mapping[str, Any]) -> bool:
    return kind == LOAD_BALANCER or scaling["type"] == "QUEUE_DELAY"


def _check_workers(workers: Mapping[str, Any]) -> None:
    if workers["max"] is not None and workers["min"] > workers["max"] >= 0:
        raise OptionError(f"--workers-min {workers['min']} exceeds --workers-max {workers['max']}: raise --workers-max")


def update_request(endpoint: Endpoint, options: Options, choice: Choice | None) -> dict[str, Any]:
    """Return what the options ask of an endpoint, as in `create_request` but only what they name.

    Raises:
        OptionError: options exclude each other, or do not suit the endpoint.
    """
    wanted = options.fields()
    scaling = wanted.get("scaling") or endpoint.scaling.model_dump(by_alias=True)
    if "idleTimeout" in wanted.get("workers", {}) and not _has_idle_timeout(endpoint.type, scaling):
        raise OptionError("--idle-timeout is not for queues that scale by requests: give --queue-delay as well")
    workers = {"min": endpoint.workers.min or 0, "max": endpoint.workers.max, **wanted.get("workers", {})}
    if "workers" in wanted:
        _check_workers(workers)
    if choice is not None:
        wanted["gpu"] = wanted.get("gpu", {}) | {"pools": choice.pool_ids, "count": choice.count}
        wanted["gpu"]["excludedTypes"] = choice.excluded
    env = dict(endpoint.env or {})
    if missing := [name for name in options.unset if name not in env]:
        raise OptionError(f"--unset {missing[0]}: the endpoint does not have it; it has {', '.join(sorted(env))}")
    env = {name: value for name, value in env.items() if name not in options.unset} | dict(options.env or {})
    if options.execution_timeout_s is not None:
        env["DELIVERY_TIMEOUT_S"] = f"{options.execution_timeout_s:g}"
    if options.gpus_per_worker is not None:
        env["TENSOR_PARALLEL_SIZE"] = str(options.gpus_per_worker)
    if options.flashboot not in (None, "OFF"):
        env.setdefault("WARM_UP", "true")
    return wanted | {"env": env}


def changes(endpoint: Endpoint, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Compare an endpoint with what is wanted of it.

    Returns:
        The body of the request that changes what differs, and a line for each difference, without secrets.

    Raises:
        OptionError: a difference cannot be changed.
    """
    if endpoint.cpu and "gpu" in wanted:
        raise OptionError(
            f"{endpoint.name} is a CPU endpoint, which cannot become one with GPUs: choose another --name"
        )
    if wanted.get("type") is not None and endpoint.type is not None and wanted["type"] != endpoint.type:
        raise OptionError(
            f"{endpoint.name} is of type {endpoint.type}, which cannot be changed: choose another --name, "
            f"or run `down {endpoint.name}` first"
        )
    present = endpoint.model_dump(mode="json", by_alias=True)
    body: dict[str, Any] = {}
    lines: list[str] = []
    for name, value in wanted.items():
        before = present.get(name)
        if name in _PARTS:
            if differing := _PARTS[name](before or {}, value):
                body[name] = differing
                lines += [
                    f"{name}.{part}: {_shown((before or {}).get(part))} -> {_shown(new)}"
                    for part, new in differing.items()
                ]
        elif name == "env":
            if value != (before or {}):
                body[name] = value
                lines += _env_lines(before or {}, value)
        elif name not in _FIXED and _comparable(name, before) != _comparable(name, value):
            body[name] = value
            lines.append(f"{name}: {_shown(before)} -> {_shown(value)}")
    return body, lines


def _worker_changes(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {part: new for part, new in wanted.items() if before.get(part) != new}


def _gpu_changes(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs: pools and excluded types are one selection, and a floor replaces a set of CUDA versions."""
    differing: dict[str, Any] = {}
    if "pools" in wanted:
        selection = {"pools": wanted["pools"], "excludedTypes": wanted.get("excludedTypes", [])}
        if any(set(selection[part]) != set(before.get(part) or []) for part in selection):
            differing |= {part: value for part, value in selection.items() if value}
    for part in ("count", "minCudaVersion"):
        if part in wanted and wanted[part] != before.get(part):
            differing[part] = wanted[part]
    if "minCudaVersion" in differing and before.get("allowedCudaVersions"):
        differing["allowedCudaVersions"] = []
    return differing


# What is compared part by part, and what an endpoint keeps.
_PARTS = {"gpu": _gpu_changes, "workers": _worker_changes}
_FIXED = ("name", "type")


def _comparable(name: str, value: Any) -> Any:
    """Return a value in a form that is the same for equal ones: the API sends empty lists and nulls."""
    if name in ("networkVolumes", "dataCenterIds", "ports"):
        return set(value or ())
    return value


def _env_lines(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    shown = environment.masked(after), environment.masked(before)
    lines = []
    for name in sorted({*before, *after}):
        if name not in before:
            lines.append(f"env: + {name}={shown[0][name]}")
        elif name not in after:
            lines.append(f"env: - {name}")
        elif before[name] != after[name]:
            lines.append(f"env: {name}={shown[1][name]} -> {shown[0][name]}")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(str(part) for part in value.values())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
