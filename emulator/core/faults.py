"""Faults on demand: the same seed injects the same faults into the same sequence of a route's requests."""

from __future__ import annotations

import random
from enum import StrEnum
from typing import Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

WorkerRoute = Literal["job-take", "job-stream", "job-done", "job-stop", "ping"]
ClientRoute = Literal["run", "runsync", "status", "stream", "cancel", "retry", "purge-queue", "health", "openai"]
WORKER_ROUTES: Final = frozenset(get_args(WorkerRoute))


class FaultKind(StrEnum):
    """What goes wrong with a request."""

    LATENCY = "latency"
    ERROR = "error"
    DROP = "drop"
    DUPLICATE = "duplicate"
    KILL = "kill"


class FaultTiming(StrEnum):
    """Whether a fault is injected before the request takes effect, or after."""

    BEFORE = "before"
    AFTER = "after"


class FaultRule(BaseModel):
    """One fault, and the requests that it is injected into.

    Args:
        kind: latency: the request is handled, or its response sent, `latency_ms` late.
            error: the response has the status `status`.
            drop: the connection is closed without a response.
            duplicate: the jobs of a take are given out again, to the next worker that asks.
            kill: the worker that sent the request is killed.
        route: path segment after the endpoint. `*` matches all.
        rate: probability from 0 to 1.
        times: maximum number of injections; None: no maximum.
        endpoint: id of the only endpoint that it applies to; None: all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: FaultKind
    route: Literal["*", ClientRoute, WorkerRoute] = "*"
    rate: float = Field(1.0, ge=0, le=1)
    when: FaultTiming = FaultTiming.BEFORE
    status: int = Field(500, ge=400, le=599)
    latency_ms: int = Field(0, ge=0)
    times: int | None = Field(None, ge=0)
    endpoint: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind is FaultKind.DUPLICATE and self.route != "job-take":
            raise ValueError("duplicate requires the route job-take")
        if self.kind is FaultKind.KILL and self.route not in WORKER_ROUTES:
            raise ValueError(
                "kill requires a route that workers call: job-take, job-stream, job-done, job-stop or ping"
            )
        if self.kind is FaultKind.LATENCY and not self.latency_ms:
            raise ValueError("latency requires latency_ms")
        return self


class FaultSettings(BaseModel):
    """All faults: the document of `--faults` and of `PUT /faults`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    rules: tuple[FaultRule, ...] = ()
    throttled_workers: int = Field(0, ge=0, description="number of workers that cannot be started")


class Faults:
    """The faults that are active now."""

    def __init__(self, settings: FaultSettings | None = None) -> None:
        self.set(settings or FaultSettings())

    def set(self, settings: FaultSettings) -> None:
        """Replace all faults; each rule's random sequence starts again."""
        self.settings = settings
        # One sequence per rule: requests of one route do not change which requests of another get a fault.
        self._sequences = [random.Random(f"{settings.seed}/{index}") for index in range(len(settings.rules))]  # noqa: S311
        self._injected = [0] * len(settings.rules)

    @property
    def throttled_workers(self) -> int:
        """How many workers cannot be started."""
        return self.settings.throttled_workers

    def match(self, endpoint: str, route: str) -> list[FaultRule]:
        """Return the rules to apply to this request, and count them."""
        matched = []
        for index, rule in enumerate(self.settings.rules):
            if rule.route not in ("*", route) or rule.endpoint not in (None, endpoint):
                continue
            if rule.times is not None and self._injected[index] >= rule.times:
                continue
            if self._sequences[index].random() < rule.rate:
                self._injected[index] += 1
                matched.append(rule)
        return matched

    def document(self) -> dict[str, object]:
        """Return the settings, and in `struck` how often each rule's fault was injected."""
        return {**self.settings.model_dump(mode="json"), "struck": self._injected}
