"""Settings of the control plane: the part `controlPlane` of the emulator's document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Permission = Literal["ALL", "READ", "NONE"]
Window = Literal["minute", "hour", "day"]
WINDOWS: tuple[Window, ...] = get_args(Window)
# The quotas of an account are not published; these are the ones of the description's example.
EXAMPLE_LIMITS: Final[Mapping[Window, int]] = {"minute": 60, "hour": 3000, "day": 50_000}
# Settings of an endpoint that it has from each request.
OF_REQUESTS: Final = frozenset(
    {"workersMin", "workersMax", "scalerType", "scalerValue", "idleTimeout", "executionTimeoutMs", "flashboot"}
    | {"id", "type", "balancerPort"}
)


class ControlPlaneSettings(BaseModel):
    """What the control plane needs to know that no request says."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    endpoint: dict[str, Any] = Field(
        {}, description="settings of endpoints that are created, for what a request does not say: command, grace, ..."
    )
    model_dir: str | None = Field(
        None,
        alias="modelDir",
        description="directory of the model that workers load, whatever model their endpoint asks for, under the name "
        "that it asks for",
    )
    image_pull_s: float = Field(0, alias="imagePull", ge=0, description="seconds that the pull of an image takes")
    permissions: dict[str, Permission] = Field(
        {}, description="what an API key may do here: ALL (default), READ or NONE; it must be one of apiKeys"
    )
    rate_limits: dict[Window, Annotated[int, Field(ge=1)]] | None = Field(
        default_factory=lambda: dict(EXAMPLE_LIMITS),
        alias="rateLimits",
        description="requests of all keys together in each window; null: no limit",
    )
