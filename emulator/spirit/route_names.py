"""What faults know of Spirit's requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.types import Scope

from emulator.api.fault_middleware import RouteName
from emulator.api.ports import Ports
from emulator.core.faults import AGENT_ROUTES

_OPERATIONS: Final = frozenset({"sync", "async", "status"})
# `/v1/ID/OPERATION`, and of an agent `/apis/v1/ROUTE`, split at the slashes.
_NATIVE_SEGMENTS: Final = 4
_AGENT_SEGMENT: Final = 3


def gateway_route_name(scope: Scope) -> RouteName:
    """Return what a path of the gateway names. That of a proxied request does not name its service."""
    segments = scope["path"].split("/")
    if segments[1] not in ("v1", "api"):
        return RouteName()
    if segments[1] == "v1" and len(segments) == _NATIVE_SEGMENTS and segments[3] in _OPERATIONS:
        return RouteName(segments[2], segments[3])
    return RouteName(route="proxy")


def agent_route_name(agents: Ports) -> Callable[[Scope], RouteName]:
    """Return a function for the agents' app."""

    def name(scope: Scope) -> RouteName:
        endpoint, worker = agents.owner(scope["server"][1])
        route = (scope["path"].split("/") + [""] * _AGENT_SEGMENT)[_AGENT_SEGMENT]
        return RouteName(endpoint, route, worker) if route in AGENT_ROUTES else RouteName()

    return name
