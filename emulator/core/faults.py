"""Faults on demand: the same seed gives the same faults to the same sequence of requests of a route."""

from __future__ import annotations

import random
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FaultKind(StrEnum):
    """What can go wrong with one request."""

    LATENCY = "latency"
    ERROR = "error"
    DROP = "drop"
    DUPLICATE = "duplicate"
    KILL = "kill"


class When(StrEnum):
    """Whether a fault strikes before the request has had its effect, or after."""

    BEFORE = "before"
    AFTER = "after"


class Rule(BaseModel):
    """One fault.

    Args:
        kind: latency: the request is handled, or its answer sent, `latency_ms` late (a job that is taken, say).
            error: it is answered with `status`, 429 among them. drop: its connection is closed without an answer.
            duplicate: the jobs of a take are given out once more, to the next worker that asks.
            kill: the worker that made the request is killed.
        route: the word after the endpoint: run, runsync, status, stream, cancel, retry, purge-queue, health, openai;
            job-take, job-stream, job-done, job-stop, ping. `*` is all of them.
        rate: how often, from 0 to 1.
        times: how many times at most; None is without end.
        endpoint: only this one, or all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: FaultKind
    route: str = Field("*", pattern=r"^(\*|[a-z-]+)$")
    rate: float = Field(1.0, ge=0, le=1)
    when: When = When.BEFORE
    status: int = Field(500, ge=400, le=599)
    latency_ms: int = Field(0, ge=0)
    times: int | None = Field(None, ge=0)
    endpoint: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind is FaultKind.DUPLICATE and self.route != "job-take":
            raise ValueError("only the route job-take can be duplicated")
        if self.kind is FaultKind.KILL and self.route not in ("job-take", "job-stream", "job-done", "job-stop", "ping"):
            raise ValueError("kill strikes at a route that a worker calls: job-take, job-stream, job-done, ...")
        if self.kind is FaultKind.LATENCY and not self.latency_ms:
            raise ValueError("latency needs latency_ms")
        return self


class FaultSettings(BaseModel):
    """All faults: the document of `--faults` and of `PUT /faults`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    rules: tuple[Rule, ...] = ()
    throttled_workers: int = Field(0, ge=0, description="so many workers cannot be started")


class Faults:
    """The faults that are on now."""

    def __init__(self, settings: FaultSettings | None = None) -> None:
        self.set(settings or FaultSettings())

    def set(self, settings: FaultSettings) -> None:
        """Replace all faults; each rule begins its sequence anew."""
        self.settings = settings
        # A sequence for each rule: what one route does has no influence on what another gets.
        self._sequences = [random.Random(f"{settings.seed}/{index}") for index in range(len(settings.rules))]  # noqa: S311
        self._struck = [0] * len(settings.rules)

    @property
    def throttled_workers(self) -> int:
        """How many workers cannot be started."""
        return self.settings.throttled_workers

    def strike(self, endpoint: str, route: str) -> list[Rule]:
        """The rules that strike at this request."""
        struck = []
        for index, rule in enumerate(self.settings.rules):
            if rule.route not in ("*", route) or rule.endpoint not in (None, endpoint):
                continue
            if rule.times is not None and self._struck[index] >= rule.times:
                continue
            if self._sequences[index].random() < rule.rate:
                self._struck[index] += 1
                struck.append(rule)
        return struck

    def document(self) -> dict[str, object]:
        """The settings, and how often each rule has struck."""
        return {**self.settings.model_dump(mode="json"), "struck": self._struck}
