"""Settings: one document for the emulator and its endpoints, from the command line or a JSON file.

Names and defaults are the platform's (`workersMin`, `scalerType`, ...) where it has them.
"""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from emulator.control_plane.settings import ControlPlaneSettings
from emulator.core.faults import FaultSettings
from emulator.core.job_queue import QueueSettings
from emulator.integers import parse_integer

CONTROL_PLANE_NAMES: Final = ("serverless", "templates", "catalog", "billing")
"""First segments of the control plane's paths below `/v2`, where other paths have an endpoint's id."""
ScalerType = Literal["QUEUE_DELAY", "REQUEST_COUNT", "QUEUE_LENGTH"]


class FleetSettings(BaseModel):
    """What an endpoint has on any platform: what its workers run, and how it scales."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    id: str = Field("local", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="endpoint id in URLs")
    command: tuple[str, ...] = Field((), description="command of a worker; without it, no workers are started")
    cwd: str | None = Field(None, description="working directory of workers")
    env: dict[str, str] = Field({}, description="variables for workers, in addition to the emulator's environment")

    workers_min: int = Field(0, alias="workersMin", ge=0, description="minimum number of workers")
    workers_max: int = Field(2, alias="workersMax", ge=0, le=64, description="maximum number of workers")
    scaler_type: ScalerType = Field("QUEUE_DELAY", alias="scalerType", description="rule that adds workers")
    scaler_value: float = Field(
        4,
        alias="scalerValue",
        gt=0,
        description="QUEUE_DELAY: seconds that a job waits before a worker is added; REQUEST_COUNT: jobs per worker; "
        "QUEUE_LENGTH: waiting jobs for which a worker is added",
    )
    # The platform's default is 5 s. On a developer's machine an idle worker is free, and a cold start is a wait.
    idle_timeout_s: float = Field(
        60, alias="idleTimeout", gt=0, description="seconds without a job until a worker is stopped"
    )
    flashboot: bool = Field(
        default=False, description="freeze idle workers instead of stopping them, and thaw them when they are needed"
    )
    frozen_timeout_s: float = Field(
        3600, alias="frozenTimeout", gt=0, description="seconds until a frozen worker is ended"
    )
    # "If your worker's cold start time exceeds the default 7-minute limit, the system may mark it as unhealthy."
    init_timeout_s: float = Field(
        420, alias="initTimeout", gt=0, description="maximum time until a worker is ready, in seconds"
    )

    grace_s: float = Field(45, alias="grace", ge=0, description="seconds from SIGTERM to SIGKILL")
    lost_after_s: float = Field(
        40, alias="lostAfter", gt=0, description="seconds until a job that its worker no longer reports is lost"
    )
    max_retries: int = Field(1, alias="maxRetries", ge=0, description="how often a lost job is queued again")

    @field_validator("command", mode="before")
    @classmethod
    def _split_command(cls, value: Any) -> Any:
        return tuple(shlex.split(value)) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.workers_min > self.workers_max:
            raise ValueError(f"workersMin={self.workers_min} exceeds workersMax={self.workers_max}")
        return self

    @property
    def effective_init_timeout_s(self) -> float:
        """Maximum time until a worker is ready."""
        return self.init_timeout_s


class EndpointSettings(FleetSettings):
    """One queue endpoint on RunPod."""

    type: Literal["QUEUE"] = "QUEUE"
    scaler_type: Literal["QUEUE_DELAY", "REQUEST_COUNT"] = Field(
        "QUEUE_DELAY", alias="scalerType", description="rule that adds workers"
    )
    execution_timeout_ms: float = Field(
        600_000, alias="executionTimeoutMs", gt=0, description="maximum execution time of a job in milliseconds"
    )
    long_poll_s: float = Field(
        30, alias="longPoll", gt=0, le=85, description="maximum duration of a worker's long poll in seconds"
    )
    ping_interval_ms: int = Field(
        10_000, alias="pingInterval", ge=1000, description="milliseconds between a worker's pings"
    )
    rate_limits: bool = Field(default=True, alias="rateLimits", description="enforce the documented rate limits")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.command and self.lost_after_s * 1000 <= self.ping_interval_ms:
            # An idle worker's only requests between its long polls are pings.
            raise ValueError(
                f"lostAfter={self.lost_after_s:g} (seconds) must exceed "
                f"pingInterval={self.ping_interval_ms} (milliseconds)"
            )
        timeout = self.env.get("RUNPOD_INIT_TIMEOUT")
        if timeout is not None and parse_integer(timeout) is None:
            raise ValueError(f"RUNPOD_INIT_TIMEOUT={timeout!r}: expected an integer number of seconds")
        return self

    @property
    def effective_init_timeout_s(self) -> float:
        """Maximum time until a worker is ready; as on the platform, the workers' `RUNPOD_INIT_TIMEOUT` overrides it."""
        return float(self.env.get("RUNPOD_INIT_TIMEOUT", self.init_timeout_s))

    def queue_settings(self) -> QueueSettings:
        """Return the settings of the endpoint's queue."""
        return QueueSettings(
            execution_timeout_s=self.execution_timeout_ms / 1000,
            lost_after_s=self.lost_after_s,
            stop_grace_s=self.grace_s,
            max_retries=self.max_retries,
            max_workers=self.workers_max,
        )


class BalancerSettings(FleetSettings):
    """One load-balancing endpoint on RunPod; the defaults of the limits are docs.runpod.io's."""

    type: Literal["LOAD_BALANCER"] = "LOAD_BALANCER"
    scaler_type: Literal["REQUEST_COUNT"] = Field(
        "REQUEST_COUNT", alias="scalerType", description="rule that adds workers"
    )
    port: int = Field(
        0, alias="balancerPort", ge=0, le=65535, description="port of the endpoint's own URL; 0: any free port"
    )
    health_interval_s: float = Field(
        1, alias="healthInterval", gt=0, description="seconds between a worker's health checks"
    )
    no_worker_s: float = Field(
        120, alias="noWorker", gt=0, description="seconds that a request waits for a worker, before it gets 400"
    )
    request_timeout_s: float = Field(
        330,
        alias="requestTimeout",
        gt=0,
        description="maximum duration of a request in seconds, after which it gets 524",
    )
    affinity_wait_s: float = Field(
        300, alias="affinityWait", gt=0, description="seconds that a request waits for the only worker that it may have"
    )
    max_body_bytes: int = Field(
        30 * 1024 * 1024, alias="maxBody", gt=0, description="maximum size of a request's or a response's body in bytes"
    )

    @property
    def health_check_path(self) -> str:
        """Path of the health check."""
        return self.env.get("HEALTH_CHECK_PATH") or "/ping"


class ServerSettings(BaseModel):
    """What an emulator has on any platform."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    tls: bool = False
    api_keys: tuple[str, ...] = Field(("local",), alias="apiKeys", min_length=1)
    faults: FaultSettings = FaultSettings()


def _endpoint_type(value: Any) -> str:
    kind = value.get("type", "QUEUE") if isinstance(value, dict) else value.type
    return str(kind)


RunPodEndpointSettings = EndpointSettings | BalancerSettings
_EndpointSettings = Annotated[
    Annotated[EndpointSettings, Tag("QUEUE")] | Annotated[BalancerSettings, Tag("LOAD_BALANCER")],
    Discriminator(_endpoint_type),
]
"""Settings of an endpoint of either type; without `type`, of a queue endpoint."""


class EmulatorSettings(ServerSettings):
    """All settings of an emulator of RunPod: the document of `--config`."""

    platform: Literal["runpod"] = "runpod"
    endpoints: tuple[_EndpointSettings, ...] = (EndpointSettings(),)
    control_plane: ControlPlaneSettings = Field(ControlPlaneSettings(), alias="controlPlane")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if taken := [endpoint.id for endpoint in self.endpoints if endpoint.id in CONTROL_PLANE_NAMES]:
            raise ValueError(f"id={taken[0]} is a path of the control plane; choose another")
        if self.control_plane.permissions.keys() - set(self.api_keys):
            raise ValueError("controlPlane.permissions: a key is none of apiKeys")
        return self
