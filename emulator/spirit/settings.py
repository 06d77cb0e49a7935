"""Settings of Spirit's emulation; the defaults of the limits are API.md's and README.md's."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from emulator.settings import FleetSettings, ServerSettings

_MB: Final = 1024 * 1024
_DAY_S: Final = 24 * 60 * 60


class SpiritEndpointSettings(FleetSettings):
    """One serverless service on Spirit."""

    scaler_type: Literal["QUEUE_DELAY", "QUEUE_LENGTH"] = Field(
        "QUEUE_DELAY", alias="scalerType", description="rule that adds workers"
    )
    lost_after_s: float = Field(
        20, alias="lostAfter", gt=0, description="seconds until a task that its worker no longer reports is lost"
    )
    long_poll_s: float = Field(
        0, alias="longPoll", ge=0, lt=300, description="how long an agent holds a take while there is no task"
    )
    heartbeat_interval_s: int = Field(
        5, alias="heartbeatInterval", ge=1, description="seconds between a worker's heartbeats"
    )
    agent_ports: tuple[Annotated[int, Field(ge=0, le=65535)], ...] = Field(
        (), alias="agentPorts", description="ports of agents for workers that are started by hand; 0: any free one"
    )

    accept_bearer: bool = Field(
        default=False, alias="acceptBearer", description="accept `Bearer ID-KEY` for proxied requests, too"
    )
    answer_early: bool = Field(
        default=False,
        alias="answerEarly",
        description="when the client of a proxied request has gone, answer its worker with 200 at once, instead of "
        "closing the connection",
    )

    sync_ttl_s: float = Field(180, alias="syncTtl", gt=0, description="seconds that a sync request waits")
    async_ttl_s: float = Field(
        900, alias="asyncTtl", gt=0, lt=_DAY_S, description="seconds that an async request waits for a worker"
    )
    first_byte_s: float = Field(
        180, alias="firstByte", gt=0, description="seconds that a proxied request waits for the start of its response"
    )
    transfer_s: float = Field(
        180, alias="transfer", gt=0, description="maximum duration of a proxied response's transfer in seconds"
    )
    max_body_bytes: int = Field(20 * _MB, alias="maxBody", gt=0, description="maximum size of a request's body")
    max_sync_result_bytes: int = Field(
        10 * _MB, alias="maxSyncResult", gt=0, description="maximum size of a sync request's result"
    )
    max_async_result_bytes: int = Field(
        2 * _MB, alias="maxAsyncResult", gt=0, description="maximum size of an async request's result"
    )
    retention_s: float = Field(1800, alias="retention", ge=0, description="seconds that results are kept")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lost_after_s <= self.heartbeat_interval_s:
            raise ValueError(
                f"lostAfter={self.lost_after_s:g} must exceed heartbeatInterval={self.heartbeat_interval_s}"
            )
        return self


class SpiritEmulatorSettings(ServerSettings):
    """All settings of an emulator of Spirit: the document of `--config`."""

    platform: Literal["spirit"] = "spirit"
    endpoints: tuple[SpiritEndpointSettings, ...] = Field((SpiritEndpointSettings(),), min_length=1)
