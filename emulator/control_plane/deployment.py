"""One endpoint as the control plane sees it: its configuration, its releases, and the documents about its workers."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from emulator.api.bodies import describe_validation_error
from emulator.balancer.endpoint import BalancerEndpoint
from emulator.control_plane.catalog import Placement, place
from emulator.control_plane.container import Host
from emulator.control_plane.logs import WorkerLogs, format_time
from emulator.control_plane.releases import Release, diff
from emulator.control_plane.rules import Config, has_idle_timeout
from emulator.control_plane.settings import ControlPlaneSettings
from emulator.control_plane.stand_in import stand_in
from emulator.core.endpoint import Surroundings
from emulator.core.runpod_endpoint import RunPodEndpoint
from emulator.core.worker import FleetWorker, WorkerState
from emulator.errors import BadRequestError
from emulator.settings import BalancerSettings, RunPodEndpointSettings

ManagedEndpoint = RunPodEndpoint | BalancerEndpoint
"""What an endpoint of the API can be: `QUEUE` or `LOAD_BALANCER`."""
_ID_BYTES: Final = 5
_STATUSES: Final = {
    WorkerState.RUNNING: "RUNNING",
    WorkerState.IDLE: "IDLE",
    WorkerState.INITIALIZING: "INITIALIZING",
    WorkerState.THROTTLED: "THROTTLED",
    WorkerState.UNHEALTHY: "UNHEALTHY",
    # These are listed only as long as they have jobs.
    WorkerState.STOPPING: "RUNNING",
    WorkerState.FROZEN: "RUNNING",
}
_SCALED_DOWN: Final = frozenset({WorkerState.STOPPING, WorkerState.FROZEN})
_PORTS: Final = ("PORT", "PORT_HEALTH")
_MIN_QUEUE_DELAY_S: Final = 0.5
_IDLE_TIMEOUT_RANGE_S: Final = (1, 3600)


def endpoint_settings(base: RunPodEndpointSettings, endpoint_id: str, config: Config) -> RunPodEndpointSettings:
    """Return an endpoint's settings: those of the base, with what the configuration says.

    Raises:
        BadRequestError: the configuration cannot be run.
    """
    scaling, workers = config["scaling"], config["workers"]
    document = {
        **base.model_dump(),
        "id": endpoint_id,
        "env": {**base.env, **_worker_env(config)},
        "workers_min": workers["min"],
        "workers_max": workers["max"],
        "scaler_type": scaling["type"],
        "scaler_value": scaling.get("queueDelay", scaling.get("requestCount")),
        "idle_timeout_s": workers["idleTimeout"],
        "flashboot": config["flashboot"] != "OFF",
    }
    if isinstance(base, BalancerSettings):
        document["request_timeout_s"] = min(base.request_timeout_s, config["timeout"] / 1000)
    else:
        document["execution_timeout_ms"] = config["timeout"]
    try:
        return type(base).model_validate(document)
    except ValidationError as error:
        raise BadRequestError(describe_validation_error(error)) from None


def _worker_env(config: Config) -> dict[str, str]:
    """Return an endpoint's variables; the workers of a load balancer share this machine, and get ports of their own."""
    own_ports = _PORTS if config["type"] == "LOAD_BALANCER" else ()
    return {name: value for name, value in config["env"].items() if name not in own_ports}


def config_of(settings: RunPodEndpointSettings) -> Config:
    """Return the configuration of an endpoint that the emulator's options define, which have no image and no GPU."""
    value = settings.scaler_value
    scaling: dict[str, Any] = {"type": "QUEUE_DELAY", "queueDelay": max(value, _MIN_QUEUE_DELAY_S)}
    if settings.scaler_type == "REQUEST_COUNT":
        scaling = {"type": "REQUEST_COUNT", "requestCount": max(1, round(value))}
    if isinstance(settings, BalancerSettings):
        timeout_ms = settings.request_timeout_s * 1000
    else:
        timeout_ms = settings.execution_timeout_ms
    shortest, longest = _IDLE_TIMEOUT_RANGE_S
    return {
        "name": settings.id,
        "type": settings.type,
        "image": "local/worker:latest",
        "args": "",
        "disk": 20,
        "ports": [],
        "env": dict(settings.env),
        "registry": None,
        "gpu": {"pools": ["ADA_24"], "count": 1, "allowedCudaVersions": [], "minCudaVersion": None},
        "workers": {
            "min": settings.workers_min,
            "max": settings.workers_max,
            "idleTimeout": min(max(shortest, round(settings.idle_timeout_s)), longest),
        },
        "scaling": scaling,
        "dataCenterIds": [],
        "networkVolumes": [],
        "timeout": round(timeout_ms),
        "flashboot": "FLASHBOOT" if settings.flashboot else "OFF",
    }


class Deployment:
    """An endpoint that the API has created, or that the emulator's options define.

    Args:
        endpoint_id: the endpoint's id.
        config: its first configuration.
        base: its settings, for what a configuration does not say.
        settings: settings of the control plane.
        surroundings: what all endpoints share.
    """

    endpoint: ManagedEndpoint
    template_id: str

    def __init__(
        self,
        endpoint_id: str,
        config: Config,
        base: RunPodEndpointSettings,
        settings: ControlPlaneSettings,
        surroundings: Surroundings,
    ) -> None:
        self.id = endpoint_id
        self.config = config
        self.logs = WorkerLogs(surroundings.wall_clock)
        self._base = base
        self._model_dir = settings.model_dir
        self._stand_in_note: str | None = None
        self._shared = surroundings
        # Workers of the last version may still log its secrets: none is ever left out again.
        self._redaction = surroundings.redaction.including(environment=config["env"])
        self._created_at = format_time(surroundings.wall_clock())
        self._releases: list[Release] = []
        self._release([])
        faults = surroundings.faults
        host = Host(
            surroundings.start,
            image=lambda: str(self.config["image"]),
            note=lambda: self._stand_in_note,
            log=lambda worker, line: self.logs.add(worker, "system", line),
            pull_s=settings.image_pull_s,
            is_missing=lambda image: image in faults.settings.missing_images,
        )
        self.surroundings = dataclasses.replace(
            surroundings,
            start=host.start_worker,
            redaction=self._redaction,
            worker_log=self._on_worker_log,
        )
        """What the endpoint is made with."""

    @property
    def version(self) -> int:
        """The current version of what workers run."""
        return len(self._releases)

    def settings(self) -> RunPodEndpointSettings:
        """Return the endpoint's settings by its configuration, with a stand-in for its model if there is one.

        Raises:
            BadRequestError: the configuration cannot be run.
        """
        result = endpoint_settings(self._base, self.id, self.config)
        if self._model_dir is None:
            return result
        env, note = stand_in(result.env, self._model_dir)
        if note != self._stand_in_note:
            self._stand_in_note = note
            self._shared.event_log(self.id, note)
        return result.model_copy(update={"env": env})

    def update(self, config: Config) -> None:
        """Apply another configuration: a release if workers must be replaced for it.

        Raises:
            BadRequestError: the configuration cannot be run; nothing has changed.
        """
        endpoint_settings(self._base, self.id, config)
        changes = diff(self.config, config)
        self.config = config
        if changes:
            self._release(changes)
        self._redaction = self._redaction.including(environment=config["env"])
        self.endpoint.update(self.settings(), self._redaction, self.version)

    def document(self) -> dict[str, Any]:
        """Return the endpoint as the API shows it."""
        workers = dict(self.config["workers"])
        if not has_idle_timeout(self.config):
            del workers["idleTimeout"]
        return {
            "id": self.id,
            **self.config,
            "workers": workers,
            "requestUrls": self.endpoint.request_urls(),
            "createdAt": self._created_at,
        }

    def workers_document(self) -> dict[str, Any]:
        """Return the active workers, and how many there are by status."""
        workers = [self._worker(worker) for worker in self._workers()]
        statuses = [worker["status"] for worker in workers]
        names = dict.fromkeys(_STATUSES.values())
        return {
            "endpointVersion": self.version,
            "summary": {**{name.lower(): statuses.count(name) for name in names}, "total": len(workers)},
            "workers": workers,
        }

    def releases_document(self) -> dict[str, Any]:
        """Return the releases, newest first, and how far the last one has come."""
        workers = self._workers()
        latest = sum(not worker.is_stale for worker in workers)
        counts = [worker.version for worker in workers]
        return {
            "endpointVersion": self.version,
            "rollout": {
                "inProgress": latest < len(workers),
                "workersOnLatest": latest,
                "workersTotal": len(workers),
                "percentOnLatest": 100 * latest // len(workers) if workers else 0,
            },
            "releases": [one.document(counts.count(one.version)) for one in reversed(self._releases)],
        }

    def has_worker(self, worker: str) -> bool:
        """Return whether the worker is active, or has a log that is still kept."""
        return self.logs.has(worker) or self.is_active(worker)

    def is_active(self, worker: str) -> bool:
        """Return whether the worker may still write to its log."""
        return any(one.id == worker for one in self.endpoint.fleet.workers())

    def placement(self) -> Placement:
        """Return where workers of the current version run."""
        return place(self.config)

    def _workers(self) -> list[FleetWorker]:
        """Return the workers that count: one that is frozen or stops, and has no jobs, is scaled down."""
        endpoint = self.endpoint
        return [
            worker
            for worker in endpoint.fleet.workers()
            if worker.state not in _SCALED_DOWN or endpoint.queue.running_jobs(worker.id)
        ]

    def _worker(self, worker: FleetWorker) -> dict[str, Any]:
        config: Mapping[str, Any] = self.config if worker.version is None else self._releases[worker.version - 1].config
        placed = place(config)
        document = {
            "id": worker.id,
            "status": _STATUSES[worker.state],
            "isStale": worker.is_stale,
            "version": worker.version,
            "gpuCount": placed.gpu_count,
            "image": config["image"],
        }
        if worker.state is WorkerState.THROTTLED:
            return {**document, "uptimeSeconds": None, "gpuTypeId": None, "dataCenterId": None, "startedAt": None}
        uptime_s = self._shared.clock() - worker.started_at
        return {
            **document,
            "uptimeSeconds": int(uptime_s),
            "gpuTypeId": placed.gpu_type,
            "dataCenterId": placed.data_center,
            "startedAt": format_time(self._shared.wall_clock() - uptime_s),
        }

    def _release(self, changes: list[dict[str, Any]]) -> None:
        now = format_time(self._shared.wall_clock())
        self._releases.append(Release(secrets.token_hex(_ID_BYTES), self.version + 1, self.config, now, changes))

    def _on_worker_log(self, worker: str, line: str) -> None:
        self.logs.add(worker, "container", line)
        self._shared.worker_log(worker, line)
