"""RunPod's API v2 in memory: it checks requests against the description, and its own answers too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

from runpod_api.description import violations

KEY = "rpa_ABCDEFGHIJKLMNOPQRSTUVWXYZ"
URL = "https://runpod.test"


def gpu(
    gpu_id: str, pool: str | None, memory: int, price: float | None, availability: str = "HIGH", **fields: Any
) -> dict[str, Any]:
    prices = {"secure": 1.0, "community": 1.0} | ({} if price is None else {"serverless": price})
    return {
        "id": gpu_id, "name": gpu_id.removeprefix("NVIDIA ").removeprefix("GeForce "), "pool": pool,
        "manufacturer": "NVIDIA", "memory": memory, "secure": True, "community": True, "price": prices,
        "maxCount": {"secure": 8, "community": 8}, "availability": availability, **fields,
    }  # fmt: skip


CATALOGUE = [
    gpu("NVIDIA GeForce RTX 4090", "ADA_24", 24, 1.10),
    gpu("NVIDIA L4", "AMPERE_24", 24, 0.68),
    gpu("NVIDIA RTX A5000", "AMPERE_24", 24, 0.68),
    gpu("NVIDIA A40", "AMPERE_48", 48, 1.22),
    gpu("NVIDIA H100 80GB HBM3", "ADA_80_PRO", 80, 4.18),
    gpu("NVIDIA RTX A2000", None, 6, None),
]


@dataclass
class FakeRunPod:
    """The endpoints of one account. `script` answers requests before the API does, one each; None lets one through.

    Attributes:
        requests: method and path of each.
        bodies: of POST and PATCH.
        workers: of all endpoints.
        logs: events of every worker's log.
        resumes_at_last: whether a log goes on with the last event instead of the one after it.
    """

    catalogue: list[dict[str, Any]] = field(default_factory=lambda: list(CATALOGUE))
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    releases: list[dict[str, Any]] = field(default_factory=list)
    workers: list[dict[str, Any]] = field(default_factory=list)
    logs: list[tuple[str, str]] = field(default_factory=list)
    resumes_at_last: bool = False
    script: list[Callable[[httpx.Request], httpx.Response | None]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(f"{request.method} {request.url.path}")
        if self.script and (answer := self.script.pop(0)(request)) is not None:
            return answer
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return problem(401, "missing bearer token")
        parts = request.url.path.strip("/").split("/")[1:]
        if parts[0] == "catalog":
            return self._answer(200, "ListGpuTypesResponse", {"gpus": self.catalogue})
        return self._serverless(request, parts[1:])

    def _serverless(self, request: httpx.Request, rest: list[str]) -> httpx.Response:  # noqa: PLR0911 (a table)
        if not rest:
            if request.method == "GET":
                return self._answer(200, "ListEndpointsResponse", {"endpoints": list(self.endpoints.values())})
            return self._create(json.loads(request.content))
        if rest[0] not in self.endpoints:
            return problem(404, "resource not found")
        endpoint = self.endpoints[rest[0]]
        match request.method, rest[1:]:
            case "GET", []:
                return self._answer(200, "Endpoint", endpoint)
            case "PATCH", []:
                return self._update(endpoint, json.loads(request.content))
            case "DELETE", []:
                del self.endpoints[rest[0]]
                return httpx.Response(204)
            case "GET", ["workers"]:
                states = [one["status"].lower() for one in self.workers]
                summary = {name: states.count(name) for name in ("running", "idle", "initializing", "throttled")}
                document = {
                    "workers": self.workers,
                    "summary": {**summary, "unhealthy": states.count("unhealthy"), "total": len(states)},
                    "endpointVersion": len(self.releases) or 1,
                }
                return self._answer(200, "ListEndpointWorkersResponse", document)
            case "GET", ["releases"]:
                rollout = {"inProgress": False, "workersOnLatest": 0, "workersTotal": 0, "percentOnLatest": 0}
                document = {"endpointVersion": len(self.releases) or 1, "rollout": rollout, "releases": self.releases}
                return self._answer(200, "ListEndpointReleasesResponse", document)
            case "GET", ["workers", _, "logs"]:
                last = request.headers.get("Last-Event-ID")
                after = 0 if last is None else int(last.rpartition("/")[2]) + (not self.resumes_at_last)
                events = "".join(
                    f"id: 2026-06-01T12:05:04Z/{number}\ndata: "
                    + json.dumps({"ts": "2026-06-01T12:05:04Z", "source": source, "line": line})
                    + "\n\n"
                    for number, (source, line) in enumerate(self.logs)
                    if number >= after
                )
                return httpx.Response(200, text=events, headers={"Content-Type": "text/event-stream"})
        return problem(404, "no such route")

    def _create(self, body: dict[str, Any]) -> httpx.Response:
        self.bodies.append(body)
        if errors := violations("CreateEndpointRequest", body):
            return problem(422, "Request validation failed.", errors)
        return self._answer(201, "Endpoint", self.add(body))

    def add(self, body: dict[str, Any]) -> dict[str, Any]:
        """Add the endpoint that a request would create."""
        endpoint_id = f"ep{len(self.endpoints) + 1}"
        base = f"https://api.runpod.test/v2/{endpoint_id}"
        names = {"run": "run", "runSync": "runsync", "health": "health", "purgeQueue": "purge-queue"}
        urls = {name: f"{base}/{path}" for name, path in names.items()}
        urls |= {name: f"{base}/{name}/{{job_id}}" for name in ("status", "stream", "cancel", "retry")}
        if body["type"] == "LOAD_BALANCER":
            base = f"https://{endpoint_id}.api.runpod.test"
            urls = {"base": base, "health": f"{base}/ping"}
        endpoint = {
            "id": endpoint_id, "dataCenterIds": [], "networkVolumes": [], "timeout": 300000, "flashboot": "OFF",
            "createdAt": "2026-06-01T12:00:00Z", "requestUrls": urls, "registry": None, "ports": [], "args": "", **body,
            "gpu": {"allowedCudaVersions": [], "minCudaVersion": None, **body["gpu"]},
            "workers": {"min": 0, "max": 3, **body.get("workers", {})},
        }  # fmt: skip
        self.endpoints[endpoint_id] = endpoint
        return endpoint

    def _update(self, endpoint: dict[str, Any], body: dict[str, Any]) -> httpx.Response:
        self.bodies.append(body)
        if errors := violations("UpdateEndpointRequest", body):
            return problem(422, "Request validation failed.", errors)
        for name, value in body.items():
            merged = name in ("gpu", "workers")
            endpoint[name] = {**endpoint[name], **value} if merged else value
        return self._answer(200, "Endpoint", endpoint)

    @staticmethod
    def _answer(status: int, schema: str, document: dict[str, Any]) -> httpx.Response:
        assert violations(schema, document) == []
        return httpx.Response(status, json=document)


def problem(
    status: int, detail: str, errors: Iterable[str] = (), headers: dict[str, str] | None = None
) -> httpx.Response:
    """Return an error of the API."""
    document: dict[str, Any] = {"title": "Error", "status": status, "detail": detail}
    if errors:
        document["errors"] = list(errors)
    assert violations("ErrorResponse", document) == []
    return httpx.Response(
        status, json=document, headers={"Content-Type": "application/problem+json", **(headers or {})}
    )
