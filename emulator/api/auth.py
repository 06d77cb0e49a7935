"""The app's context, and authentication."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request

from emulator.core.endpoint import Endpoint
from emulator.core.faults import Faults
from emulator.core.runpod_endpoint import RunPodEndpoint
from emulator.errors import NotFoundError, UnauthorizedError


@dataclass(frozen=True)
class AppContext:
    """What all routes act on: `request.app.state.context`.

    Args:
        endpoints: endpoints by id; they may come and go.
        api_keys: keys of clients.
        faults: the emulator's faults.
        deleted: deleted endpoints by id, whose workers have not exited yet.
        finished: set when the emulator has shut down, to end the streams of `/state/events`.
    """

    endpoints: Mapping[str, Endpoint]
    api_keys: tuple[str, ...]
    faults: Faults
    deleted: Mapping[str, Endpoint]
    finished: asyncio.Event

    def is_api_key(self, key: str) -> bool:
        """Return whether it is one of the API keys, in constant time."""
        return sum(hmac.compare_digest(key.encode(), known.encode()) for known in self.api_keys) > 0


def context_of(request: Request) -> AppContext:
    """Return the context of the app that handles the request."""
    context: AppContext = request.app.state.context
    return context


def key_of(request: Request) -> str:
    """Return the key of `Authorization: Bearer KEY` or `Authorization: KEY`; empty without one."""
    value = request.headers.get("authorization", "").strip()
    scheme, _, key = value.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else value


def authorize(request: Request) -> None:
    """Check the request's API key.

    Raises:
        UnauthorizedError: it has no valid key.
    """
    if not context_of(request).is_api_key(key_of(request)):
        raise UnauthorizedError("no valid API key; send 'Authorization: Bearer KEY'")


def endpoint_of(request: Request) -> RunPodEndpoint:
    """Return the endpoint that the path names.

    Raises:
        NotFoundError: there is no such endpoint.
    """
    return _endpoint(context_of(request).endpoints, request.path_params["endpoint"])


def endpoint_of_worker(request: Request) -> RunPodEndpoint:
    """Return the same for a worker, whose endpoint may have been deleted while it runs.

    Raises:
        NotFoundError: there is no such endpoint.
    """
    context = context_of(request)
    return _endpoint({**context.deleted, **context.endpoints}, request.path_params["endpoint"])


def _endpoint(endpoints: Mapping[str, Endpoint], endpoint_id: str) -> RunPodEndpoint:
    endpoint = endpoints.get(endpoint_id)
    if not isinstance(endpoint, RunPodEndpoint):
        raise NotFoundError(f"endpoint {endpoint_id} not found")
    return endpoint
