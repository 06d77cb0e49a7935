"""What a request for an endpoint means: a configuration as the API shows it, from a body, a template and the last one.

A body has been checked against the description's schemas, which answers 422. What the description says in its texts is
here: what contradicts is 400, a template that does not exist 404, one that is not for serverless 422. Where the texts
name no status, it is 400.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from emulator.control_plane import catalog
from emulator.errors import BadRequestError, UnprocessableError

Config = dict[str, Any]
Body = Mapping[str, Any]
FindTemplate = Callable[[str], Body]
"""Returns the template with this id, one's own or a public one; raises NotFoundError."""

CONTAINER_FIELDS: Final = ("image", "args", "disk", "ports", "env", "registry")
CONTAINER_DEFAULTS: Final[Mapping[str, Any]] = {"args": "", "disk": 20, "ports": [], "env": {}, "registry": None}
_WORKER_DEFAULTS: Final = {"min": 0, "max": 3, "idleTimeout": 10}
_PORT: Final = re.compile(r"(?P<number>\d{1,5})/(http|tcp|udp)")
_MAX_PORT: Final = 65_535


def create(body: Body, find_template: FindTemplate) -> Config:
    """Return the configuration of a new endpoint.

    Raises:
        BadRequestError: what is asked for contradicts itself, or the catalog.
        NotFoundError: there is no such template.
        UnprocessableError: the template is not for serverless endpoints.
    """
    if ("gpu" in body) == ("cpu" in body):
        raise BadRequestError("specify exactly one of gpu and cpu")
    template = _serverless_template(body, find_template)
    config: Config = {
        "name": body["name"],
        "type": body["type"],
        **CONTAINER_DEFAULTS,
        **_container(body, template),
        "gpu": None,
        "workers": {**_WORKER_DEFAULTS, **body.get("workers", {})},
        "scaling": body["scaling"],
        "dataCenterIds": body.get("dataCenterIds", []),
        "networkVolumes": body.get("networkVolumes", []),
        "timeout": body.get("timeout", 300_000),
        "flashboot": body.get("flashboot", "OFF"),
    }
    if "cpu" in body:
        del config["gpu"]
        config["cpu"] = _cpu(body["cpu"])
    else:
        gpu = dict(body["gpu"])
        if template and template["allowedCudaVersions"] and not {"allowedCudaVersions", "minCudaVersion"} & gpu.keys():
            gpu["allowedCudaVersions"] = template["allowedCudaVersions"]
        config["gpu"] = _gpu({"count": 1, "allowedCudaVersions": [], "minCudaVersion": None}, gpu)
    _check(config, body)
    return config


def update(config: Config, body: Body, find_template: FindTemplate) -> Config:
    """Return an endpoint's next configuration: what the body does not have stays as it is.

    Raises:
        BadRequestError: what is asked for contradicts itself, the catalog, or what stays.
        NotFoundError: there is no such template.
        UnprocessableError: the template is not for serverless endpoints.
    """
    if "gpu" in body and "cpu" in body:
        raise BadRequestError("specify at most one of gpu and cpu")
    if "gpu" in body and "cpu" in config:
        raise BadRequestError("gpu: this endpoint runs on CPUs, and its compute family cannot be changed")
    if "cpu" in body and "cpu" not in config:
        raise BadRequestError("cpu: this endpoint runs on GPUs, and its compute family cannot be changed")
    simple = ("name", "scaling", "dataCenterIds", "networkVolumes", "timeout", "flashboot")
    result = {
        **config,
        **_container(body, _serverless_template(body, find_template)),
        **{name: body[name] for name in simple if name in body},
        "workers": {**config["workers"], **body.get("workers", {})},
    }
    if "gpu" in body:
        result["gpu"] = _gpu(config["gpu"], body["gpu"])
    if "cpu" in body:
        result["cpu"] = _cpu(body["cpu"])
    _check(result, body)
    return result


def has_idle_timeout(config: Config) -> bool:
    """Return whether `workers.idleTimeout` applies: not to a queue that scales on its number of requests."""
    return not (config["type"] == "QUEUE" and config["scaling"]["type"] == "REQUEST_COUNT")


def check_container(container: Body) -> None:
    """Check container settings.

    Raises:
        BadRequestError: a port or a variable's name is malformed.
    """
    for port in container.get("ports", ()):
        match = _PORT.fullmatch(port)
        if match is None or not 0 < int(match["number"]) <= _MAX_PORT:
            raise BadRequestError(f"ports: {port[:50]!r} is not of the form port/protocol, such as 8000/http")
    # The values may be secrets, and so may what stands before a missing name.
    if any(not name or "=" in name or "\0" in name + value for name, value in container.get("env", {}).items()):
        raise BadRequestError("env: a name is empty or has a '=', or a name or value has a NUL character")


def _serverless_template(body: Body, find_template: FindTemplate) -> Body | None:
    if "templateId" not in body:
        return None
    template = find_template(body["templateId"])
    if not template["serverless"]:
        raise UnprocessableError(f"template {body['templateId']} is not a serverless template")
    return template


def _container(body: Body, template: Body | None) -> Config:
    """Return the container settings of a body over those of a template; variables are merged one by one."""
    given = {name: body[name] for name in CONTAINER_FIELDS if name in body}
    check_container(given)
    if template is None:
        return given
    merged = {**{name: template[name] for name in CONTAINER_FIELDS}, **given}
    return {**merged, "env": {**template["env"], **body.get("env", {})}}


def _gpu(current: Config, change: Body) -> Config:
    """Return a GPU selection: pools and exclusions are one, and replaced together."""
    result = {**current, **change}
    if "pools" in change:
        result.pop("excludedTypes", None)
        if excluded := list(dict.fromkeys(text.strip() for text in change.get("excludedTypes", ()))):
            result["excludedTypes"] = excluded
    catalog.select(result["pools"], result.get("excludedTypes", ()))
    result["minCudaVersion"] = result["minCudaVersion"] or None
    if result["allowedCudaVersions"] and result["minCudaVersion"]:
        raise BadRequestError(
            "gpu.allowedCudaVersions and gpu.minCudaVersion are mutually exclusive; clear one: [] or, in an update, ''"
        )
    return result


def _cpu(selection: list[Body]) -> list[Config]:
    return [catalog.cpu_config(one["id"], one["vcpuCount"]) for one in selection]


def _check(config: Config, body: Body) -> None:
    workers, scaling = config["workers"], config["scaling"]
    if config["type"] == "LOAD_BALANCER" and scaling["type"] != "REQUEST_COUNT":
        raise BadRequestError("scaling: a load-balancing endpoint needs REQUEST_COUNT")
    if "idleTimeout" in body.get("workers", {}) and not has_idle_timeout(config):
        raise BadRequestError("workers.idleTimeout: not applicable to queue-based endpoints that scale on requestCount")
    if workers["min"] > workers["max"]:
        raise BadRequestError(f"workers: min={workers['min']} exceeds max={workers['max']}")
    if config["timeout"] < 1:
        raise BadRequestError(f"timeout: {config['timeout']} is not a positive number of milliseconds")
