"""What the emulator is told: one document for all endpoints, from the command line or a JSON file.

Names and defaults are the platform's own (`workersMin`, `scalerType`, ...) where it has them.
"""

from __future__ import annotations

import shlex
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from emulator.core.job_queue import Rules

ScalerType = Literal["QUEUE_DELAY", "REQUEST_COUNT"]


class EndpointSettings(BaseModel):
    """One endpoint: what its workers run, and how many of them there are."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    id: str = Field("local", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="name of the endpoint in URLs")
    command: tuple[str, ...] = Field((), description="what a worker runs; without it, workers are started by hand")
    cwd: str | None = Field(None, description="directory that workers run in")
    env: dict[str, str] = Field({}, description="variables for workers, beside the emulator's own environment")

    workers_min: int = Field(0, alias="workersMin", ge=0, description="workers that always run")
    workers_max: int = Field(2, alias="workersMax", ge=0, le=64, description="most workers at once")
    scaler_type: ScalerType = Field("QUEUE_DELAY", alias="scalerType", description="the rule that adds workers")
    scaler_value: float = Field(
        4,
        alias="scalerValue",
        gt=0,
        description="QUEUE_DELAY: seconds that a job waits before a worker is added; REQUEST_COUNT: jobs per worker",
    )
    # The platform's default is 5 s; on one's own machine a worker costs nothing, and its start costs patience.
    idle_timeout_s: float = Field(
        60, alias="idleTimeout", gt=0, description="seconds without a job until it is stopped"
    )
    execution_timeout_ms: float = Field(
        600_000, alias="executionTimeoutMs", gt=0, description="most milliseconds that a job may run"
    )
    # "If your worker's cold start time exceeds the default 7-minute limit, the system may mark it as unhealthy."
    init_timeout_s: float = Field(420, alias="initTimeout", gt=0, description="most seconds that a start may take")

    grace_s: float = Field(45, alias="grace", ge=0, description="seconds from SIGTERM to SIGKILL")
    long_poll_s: float = Field(
        30, alias="longPoll", gt=0, le=85, description="most seconds that a worker's poll is held"
    )
    ping_interval_ms: int = Field(10_000, alias="pingInterval", ge=1000, description="milliseconds between pings")
    lost_after_s: float = Field(
        40, alias="lostAfter", gt=0, description="seconds until a job that its worker does not show is lost"
    )
    max_retries: int = Field(1, alias="maxRetries", ge=0, description="how often a lost job is queued again")
    rate_limits: bool = Field(default=True, alias="rateLimits", description="enforce the documented rate limits")

    @field_validator("command", mode="before")
    @classmethod
    def _split_command(cls, value: Any) -> Any:
        return tuple(shlex.split(value)) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.workers_min > self.workers_max:
            raise ValueError(f"workersMin is {self.workers_min}, above workersMax, which is {self.workers_max}")
        limit = self.env.get("RUNPOD_INIT_TIMEOUT")
        if limit is not None and not limit.isdecimal():
            raise ValueError(f"RUNPOD_INIT_TIMEOUT is {limit!r}, which is not a whole number of seconds")
        return self

    @property
    def start_limit_s(self) -> float:
        """How long a start may take; `RUNPOD_INIT_TIMEOUT` among the workers' variables raises it, as there."""
        return float(self.env.get("RUNPOD_INIT_TIMEOUT", self.init_timeout_s))

    def rules(self) -> Rules:
        """What the endpoint's queue goes by."""
        return Rules(
            execution_timeout_s=self.execution_timeout_ms / 1000,
            lost_after_s=self.lost_after_s,
            stop_grace_s=self.grace_s,
            max_retries=self.max_retries,
            max_workers=self.workers_max,
        )
