"""Releases of an endpoint: each is a version of what its workers run, with what has changed.

The names of fields are those that the description shows (`gpuCount`, `locations`, `template.imageName`,
`template.env`), and the same objects' other fields in RunPod's GraphQL API.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Config = Mapping[str, Any]


def _gpu_ids(config: Config) -> str | None:
    gpu = config.get("gpu")
    return ",".join([*gpu["pools"], *(f"-{type_id}" for type_id in gpu.get("excludedTypes", ()))]) if gpu else None


def _of_gpu(name: str) -> Callable[[Config], Any]:
    return lambda config: config["gpu"][name] if config.get("gpu") else None


def _instance_ids(config: Config) -> list[str] | None:
    cpu = config.get("cpu")
    return [f"{one['id']}-{one['vcpuCount']}-{one['memory']}" for one in cpu] if cpu else None


_FIELDS: Final[Mapping[str, Callable[[Config], Any]]] = {
    "template.imageName": lambda config: config["image"],
    "template.dockerArgs": lambda config: config["args"],
    "template.containerDiskInGb": lambda config: config["disk"],
    "template.ports": lambda config: config["ports"],
    "template.env": lambda config: config["env"],
    "template.containerRegistryAuthId": lambda config: config["registry"],
    "gpuIds": _gpu_ids,
    "gpuCount": _of_gpu("count"),
    "allowedCudaVersions": _of_gpu("allowedCudaVersions"),
    "minCudaVersion": _of_gpu("minCudaVersion"),
    "instanceIds": _instance_ids,
    "locations": lambda config: config["dataCenterIds"],
    "networkVolumeIds": lambda config: config["networkVolumes"],
    "flashBootType": lambda config: config["flashboot"],
}


def diff(old: Config, new: Config) -> list[dict[str, Any]]:
    """Return what has changed of what workers run; empty if they need not be replaced."""
    values = [(name, read(old), read(new)) for name, read in _FIELDS.items()]
    return [{"field": name, "old": before, "new": after} for name, before, after in values if before != after]


@dataclass(frozen=True)
class Release:
    """One version of an endpoint.

    Args:
        config: the endpoint's configuration when it was released.
        created_at: in RFC 3339.
        diff: what has changed since the last version.
    """

    id: str
    version: int
    config: Config
    created_at: str
    diff: list[dict[str, Any]]

    def document(self, worker_count: int) -> dict[str, Any]:
        """Return the release as the API shows it."""
        return {
            "id": self.id,
            "version": self.version,
            "source": "MANUAL",
            "buildId": None,
            "createdByUserId": None,
            "workerCount": worker_count,
            "createdAt": self.created_at,
            "diff": self.diff,
        }
