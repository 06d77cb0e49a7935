"""The way back to an earlier release: the old values that the later releases' diffs have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploy.errors import DeployError, OptionError
from runpod_api.models import Endpoint, ListEndpointReleasesResponse, Release

# A field of a diff, in the words of the API or of RunPod's templates, and where a request has it.
_FIELDS: dict[str, tuple[str, ...]] = {
    "template.imageName": ("image",),
    "template.image": ("image",),
    "template.env": ("env",),
    "template.containerDiskInGb": ("disk",),
    "template.disk": ("disk",),
    "template.dockerArgs": ("args",),
    "template.args": ("args",),
    "template.ports": ("ports",),
    "template.containerRegistryAuthId": ("registry",),
    "template.registry": ("registry",),
    "gpuCount": ("gpu", "count"),
    "gpuIds": ("gpu", "pools"),
    "minCudaVersion": ("gpu", "minCudaVersion"),
    "allowedCudaVersions": ("gpu", "allowedCudaVersions"),
    "locations": ("dataCenterIds",),
    "networkVolumeIds": ("networkVolumes",),
    "workersMin": ("workers", "min"),
    "workersMax": ("workers", "max"),
    "idleTimeout": ("workers", "idleTimeout"),
    "executionTimeoutMs": ("timeout",),
    "flashBootType": ("flashboot",),
}
_SAME_NAME = {
    "image", "env", "disk", "args", "ports", "registry", "dataCenterIds", "networkVolumes", "timeout", "flashboot",
    "scaling", "workers", "gpu", "name",
}  # fmt: skip
_LISTS = {"dataCenterIds", "networkVolumes", "ports", "pools", "excludedTypes", "allowedCudaVersions"}
# What "the field was not there" is in a request.
_ABSENT: dict[str, Any] = {"env": {}, "registry": None, "args": "", "minCudaVersion": ""}


def rollback_request(
    endpoint: Endpoint, answer: ListEndpointReleasesResponse, version: int | None
) -> tuple[dict[str, Any], int | None]:
    """Return the body of the request that undoes the releases after one.

    Args:
        endpoint: as it is.
        answer: its releases, newest first.
        version: to go back to; by default, the one before the newest.

    Returns:
        The body, and the version whose values it has.

    Raises:
        OptionError: there is no such release.
        DeployError: a diff has a field that no request can set.
    """
    releases = sorted(answer.releases, key=lambda one: (one.version or 0, one.created_at), reverse=True)
    undone = _releases_after(endpoint, releases, version)
    body: dict[str, Any] = {}
    for release in undone:  # the newest first: the oldest one's old values remain
        for entry in release.diff:
            _set(body, _place(entry.field, release), entry.old)
    gpu = body.get("gpu", {})
    if "excludedTypes" in gpu and "pools" not in gpu and endpoint.gpu is not None:
        gpu["pools"] = endpoint.gpu.pools
    if "pools" in gpu and not gpu.get("excludedTypes", True):
        del gpu["excludedTypes"]
    target = next((one for one in releases if one not in undone), None)
    return body, None if target is None else target.version


def field_name(field: str) -> str:
    """Return a field of a diff as a request has it."""
    return ".".join(_FIELDS.get(field, (field.removeprefix("template."),)))


def _releases_after(endpoint: Endpoint, releases: Sequence[Release], version: int | None) -> list[Release]:
    known = [one.version for one in releases if one.version is not None]
    if version is not None:
        if version not in known:
            raise OptionError(
                f"--to {version}: {endpoint.name} has the releases {', '.join(map(str, known)) or 'none'}"
            )
        undone = [one for one in releases if one.version is not None and one.version > version]
        if not undone:
            raise OptionError(f"--to {version}: that is the current release of {endpoint.name}")
        return undone
    if len(releases) < 2:  # noqa: PLR2004 (the newest, and the one to go back to)
        raise OptionError(f"{endpoint.name} has no earlier release to go back to")
    return [releases[0]]


def _place(field: str, release: Release) -> tuple[str, ...]:
    if field in _FIELDS:
        return _FIELDS[field]
    place = tuple(field.removeprefix("template.").split("."))
    if place[0] not in _SAME_NAME:
        raise DeployError(
            f"release {release.version} has changed {field}, which this command cannot change back: "
            "change it in the console, or run `up` as before"
        )
    return place


def _set(body: dict[str, Any], place: tuple[str, ...], old: Any) -> None:
    """Put the old value of a field into a request."""
    name = place[-1]
    if place == ("gpu", "pools") and isinstance(old, str):  # `ADA_24,-NVIDIA L4`
        parts = [part.strip() for part in old.split(",")]
        excluded = [part.removeprefix("-") for part in parts if part.startswith("-")]
        body.setdefault("gpu", {}).update(pools=[part for part in parts if not part.startswith("-")])
        if excluded:
            body["gpu"]["excludedTypes"] = excluded
        return
    if place[0] == "env" and len(place) > 1:
        raise DeployError(f"a diff names {'.'.join(place)}: run `update` with --env or --unset for it")
    if name in _LISTS and isinstance(old, str):
        old = [part for part in old.split(",") if part]
    if name == "env" and isinstance(old, list):  # of the template's own API
        old = {one["key"]: one["value"] for one in old}
    if old is None:
        old = [] if name in _LISTS else _ABSENT.get(name)
        if old is None and name not in _ABSENT:
            return  # the platform's default stays
    for part in place[:-1]:
        body = body.setdefault(part, {})
    body[name] = old
