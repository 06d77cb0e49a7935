"""Faults on demand: the same seed injects the same faults into the same sequence of a route's requests."""

from __future__ import annotations

import random
from enum import StrEnum
from typing import Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

WorkerRoute = Literal["job-take", "job-stream", "job-done", "job-stop", "ping"]
ClientRoute = Literal["run", "runsync", "status", "stream", "cancel", "retry", "purge-queue", "health", "openai"]
BalancerRoute = Literal["balancer", "health-check"]
WORKER_ROUTES: Final = frozenset(get_args(WorkerRoute))
ControlPlaneRoute = Literal["control-plane"]
RUNPOD_ROUTES: Final = WORKER_ROUTES | frozenset(
    (*get_args(ClientRoute), *get_args(BalancerRoute), *get_args(ControlPlaneRoute))
)

AgentRoute = Literal["request", "request-ack", "request-metric", "request-result", "request-proxy", "heartbeat"]
GatewayRoute = Literal["sync", "async", "status", "proxy"]
AGENT_ROUTES: Final = frozenset(get_args(AgentRoute))
SPIRIT_ROUTES: Final = AGENT_ROUTES | frozenset(get_args(GatewayRoute))

_ALL: Final = "*"
_ALL_AGENT_ROUTES: Final = "agent"
_TAKES: Final = frozenset({"job-take", "request"})


class FaultKind(StrEnum):
    """What goes wrong with a request."""

    LATENCY = "latency"
    ERROR = "error"
    DROP = "drop"
    DUPLICATE = "duplicate"
    KILL = "kill"
    UNHEALTHY = "unhealthy"
    ALTER = "alter"


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
            unhealthy: Spirit's agent says that it is unhealthy: before, without a task; after, with one if there is.
            alter: the task that Spirit's agent gives out has other `headers` (None removes one) or another `body`.
        route: RunPod: path segment after the endpoint; `balancer` for a request to a load-balancing endpoint,
            `health-check` for a health check of its workers (error and drop only), `control-plane` for the API that
            manages endpoints. Spirit: path segment after `/apis/v1` of the agent, operation of the gateway, or `proxy`
            for `/v1/...` and `/api/...`. `*` matches all, `agent` all of Spirit's agent.
        rate: probability from 0 to 1.
        times: maximum number of injections; None: no maximum.
        endpoint: id of the only endpoint that it applies to; None: all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: FaultKind
    route: Literal[
        "*", "agent", ClientRoute, BalancerRoute, WorkerRoute, ControlPlaneRoute, AgentRoute, GatewayRoute
    ] = "*"
    rate: float = Field(1.0, ge=0, le=1)
    when: FaultTiming = FaultTiming.BEFORE
    status: int = Field(500, ge=400, le=599)
    latency_ms: int = Field(0, ge=0)
    times: int | None = Field(None, ge=0)
    endpoint: str | None = None
    headers: dict[str, str | None] = {}
    body: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind is FaultKind.DUPLICATE and self.route not in _TAKES:
            raise ValueError("duplicate requires the route job-take, or request on Spirit")
        if self.kind is FaultKind.KILL and self.route not in WORKER_ROUTES | AGENT_ROUTES | {_ALL_AGENT_ROUTES}:
            raise ValueError(
                "kill requires a route that workers call: job-take, job-stream, job-done, job-stop or ping; on Spirit "
                "request, request-ack, request-metric, request-result, request-proxy, heartbeat or agent"
            )
        if self.kind in (FaultKind.UNHEALTHY, FaultKind.ALTER) and self.route != "request":
            raise ValueError(f"{self.kind} requires the route request")
        if (self.kind is FaultKind.ALTER) != bool(self.headers or self.body is not None):
            raise ValueError("alter requires headers or a body, which no other kind has")
        if self.kind is FaultKind.LATENCY and not self.latency_ms:
            raise ValueError("latency requires latency_ms")
        return self


class FaultSettings(BaseModel):
    """All faults: the document of `--faults` and of `PUT /faults`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    rules: tuple[FaultRule, ...] = ()
    throttled_workers: int = Field(0, ge=0, description="number of workers that cannot be started")
    missing_images: tuple[str, ...] = Field((), description="images that cannot be pulled")


class Faults:
    """The faults that are active now.

    Args:
        settings: the first faults.
        routes: the platform's routes.

    Raises:
        ValueError: a rule is for a route that the platform does not have.
    """

    def __init__(self, settings: FaultSettings | None = None, routes: frozenset[str] = RUNPOD_ROUTES) -> None:
        self._routes = routes
        self.set(settings or FaultSettings())

    def set(self, settings: FaultSettings) -> None:
        """Replace all faults; each rule's random sequence starts again.

        Raises:
            ValueError: a rule is for a route that the platform does not have.
        """
        named = {rule.route for rule in settings.rules} - {_ALL}
        if self._routes >= AGENT_ROUTES:
            named -= {_ALL_AGENT_ROUTES}
        if unknown := named - self._routes:
            routes = ", ".join(sorted(self._routes))
            raise ValueError(f"the platform has no route {', '.join(sorted(unknown))}; it has {routes}")
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
            of_agent = rule.route == _ALL_AGENT_ROUTES and route in AGENT_ROUTES
            if not (rule.route in (_ALL, route) or of_agent) or rule.endpoint not in (None, endpoint):
                continue
            if rule.times is not None and self._injected[index] >= rule.times:
                continue
            if self._sequences[index].random() < rule.rate:
                self._injected[index] += 1
                matched.append(rule)
        return matched

    def document(self) -> dict[str, object]:
        """Return the settings, and in `struck` how often each rule's fault was injected."""
        document = self.settings.model_dump(mode="json")
        for rule in document["rules"]:
            if rule["kind"] != FaultKind.ALTER:
                del rule["headers"], rule["body"]
        return {**document, "struck": self._injected}
