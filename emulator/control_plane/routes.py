"""The routes of RunPod's REST API v2: serverless endpoints, templates, GPU types, billing."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from emulator.api.auth import context_of
from emulator.api.bodies import JSONResponse, parse_json, read_body
from emulator.control_plane import catalog
from emulator.control_plane.deployment import Deployment
from emulator.control_plane.logs import Cursor, Source
from emulator.control_plane.parameters import LAST_EVENT_ID, read_parameters
from emulator.control_plane.plane import ControlPlane
from emulator.core.long_poll import client_disconnect
from emulator.errors import (
    APIError,
    ForbiddenError,
    NotFoundError,
    QuotaExceededError,
    UnauthorizedError,
    UnprocessableError,
)
from emulator.settings import CONTROL_PLANE_NAMES
from runpod_api import description

_MAX_BODY_BYTES: Final = 1_000_000
_READING: Final = frozenset({"GET", "HEAD"})
_KEEP_ALIVE_S: Final = 15.0
_DEFAULT_TAIL: Final = 100
_LOG_HEADERS: Final = {"Cache-Control": "no-cache", "Connection": "keep-alive", "X-Accel-Buffering": "no"}

_Operation = Callable[[Request, ControlPlane], Awaitable[Response]]


class ProblemResponse(JSONResponse):
    """An error of RFC 9457, as the description's `ErrorResponse`."""

    media_type = "application/problem+json"

    def __init__(self, error: APIError) -> None:
        document: dict[str, Any] = {
            "title": error.status.phrase,
            "status": int(error.status),
            "detail": str(error),
        }
        headers = {}
        if isinstance(error, UnprocessableError) and error.errors:
            document["errors"] = list(error.errors)
        if isinstance(error, QuotaExceededError):
            headers["Retry-After"] = str(error.retry_after_s)
        super().__init__(document, status_code=error.status, headers=headers)


# Endpoints.


async def list_endpoints(_request: Request, plane: ControlPlane) -> Response:
    """GET /v2/serverless."""
    return JSONResponse({"endpoints": [deployment.document() for deployment in plane.deployments.values()]})


async def create_endpoint(request: Request, plane: ControlPlane) -> Response:
    """POST /v2/serverless."""
    deployment = plane.create(await _body(request, "CreateEndpointRequest"))
    return JSONResponse(deployment.document(), status_code=HTTPStatus.CREATED)


async def get_endpoint(request: Request, plane: ControlPlane) -> Response:
    """GET /v2/serverless/{id}."""
    return JSONResponse(_deployment(request, plane).document())


async def update_endpoint(request: Request, plane: ControlPlane) -> Response:
    """PATCH /v2/serverless/{id}."""
    _deployment(request, plane)
    body = await _body(request, "UpdateEndpointRequest")
    return JSONResponse(plane.update(request.path_params["id"], body).document())


async def delete_endpoint(request: Request, plane: ControlPlane) -> Response:
    """DELETE /v2/serverless/{id}."""
    plane.delete(request.path_params["id"])
    return Response(status_code=HTTPStatus.NO_CONTENT)


async def list_workers(request: Request, plane: ControlPlane) -> Response:
    """GET /v2/serverless/{id}/workers."""
    return JSONResponse(_deployment(request, plane).workers_document())


async def list_releases(request: Request, plane: ControlPlane) -> Response:
    """GET /v2/serverless/{id}/releases."""
    return JSONResponse(_deployment(request, plane).releases_document())


async def stream_logs(request: Request, plane: ControlPlane) -> Response:
    """GET /v2/serverless/{id}/workers/{workerId}/logs: ends when the worker has exited."""
    deployment, worker = _deployment(request, plane), request.path_params["workerId"]
    query = read_parameters(request, "/v2/serverless/{id}/workers/{workerId}/logs")
    if not deployment.has_worker(worker):
        raise NotFoundError(f"worker {worker} not found")
    cursor = Cursor(tail=query.get("tail", _DEFAULT_TAIL))
    if LAST_EVENT_ID in query:
        cursor = query[LAST_EVENT_ID]
    elif "since" in query:
        cursor = Cursor(at=query["since"])
    events = _log_events(request, deployment, worker, cursor, query.get("source"))
    return StreamingResponse(events, media_type="text/event-stream", headers=_LOG_HEADERS)


async def _log_events(
    request: Request, deployment: Deployment, worker: str, cursor: Cursor, source: Source | None
) -> AsyncIterator[str]:
    logs = deployment.logs
    async with client_disconnect(request.receive) as disconnect:
        while True:
            # Asked first: what the worker writes before it exits is read below.
            is_active = deployment.is_active(worker)
            lines = logs.read(worker, cursor, source)
            cursor = Cursor(at=cursor.at, after=logs.last_number)
            for line in lines:
                yield line.event()
            if not is_active or disconnect.done():
                return

            def poll(after: Cursor = cursor) -> bool | None:
                return bool(logs.read(worker, after, source)) or not deployment.is_active(worker) or None

            if not await logs.long_poll.wait_for(worker, poll, _KEEP_ALIVE_S, disconnect):
                yield ": keep-alive\n\n"


# Templates.


async def list_templates(_request: Request, plane: ControlPlane) -> Response:
    """GET /v2/templates."""
    return JSONResponse({"templates": plane.templates.documents()})


async def create_template(request: Request, plane: ControlPlane) -> Response:
    """POST /v2/templates."""
    document = plane.templates.create(await _body(request, "CreateTemplateRequest"))
    return JSONResponse(document, status_code=HTTPStatus.CREATED)


async def get_template(request: Request, plane: ControlPlane) -> Response:
    """GET /v2/templates/{id}."""
    return JSONResponse(plane.templates.get(request.path_params["id"]))


async def update_template(request: Request, plane: ControlPlane) -> Response:
    """PATCH /v2/templates/{id}."""
    body = await _body(request, "UpdateTemplateRequest")
    return JSONResponse(plane.templates.update(request.path_params["id"], body))


async def delete_template(request: Request, plane: ControlPlane) -> Response:
    """DELETE /v2/templates/{id}."""
    plane.templates.delete(request.path_params["id"])
    return Response(status_code=HTTPStatus.NO_CONTENT)


# Catalog and billing.


async def list_gpu_types(request: Request, _plane: ControlPlane) -> Response:
    """GET /v2/catalog/gpus."""
    return JSONResponse({"gpus": catalog.list_gpu_types(read_parameters(request, "/v2/catalog/gpus"))})


async def get_gpu_type(request: Request, _plane: ControlPlane) -> Response:
    """GET /v2/catalog/gpus/{id}."""
    query = read_parameters(request, "/v2/catalog/gpus/{id}")
    return JSONResponse(catalog.get_gpu_type(request.path_params["id"], query))


async def list_billing(request: Request, plane: ControlPlane) -> Response:
    """GET /v2/billing/serverless."""
    query = read_parameters(request, "/v2/billing/serverless")
    return JSONResponse(plane.bill(query))


async def not_found(request: Request, _plane: ControlPlane) -> Response:
    """Answer any other path, or another method of these."""
    raise NotFoundError(f"the emulator has no {request.method} {request.url.path}")


async def _body(request: Request, schema: str) -> dict[str, Any]:
    """Return a body that is valid by the description.

    Raises:
        BadRequestError: it is not JSON.
        UnprocessableError: it violates the schema.
    """
    value = parse_json(await read_body(request, _MAX_BODY_BYTES))
    if errors := description.violations(schema, value):
        raise UnprocessableError("Request validation failed.", errors)
    result: dict[str, Any] = value
    return result


def _deployment(request: Request, plane: ControlPlane) -> Deployment:
    return plane.deployment(request.path_params["id"])


def _authenticate(request: Request) -> str:
    """Return the API key of `Authorization: Bearer KEY`.

    Raises:
        UnauthorizedError: there is none, or it is none of the emulator's.
    """
    scheme, _, key = request.headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise UnauthorizedError("missing bearer token")
    if not context_of(request).is_api_key(key.strip()):
        raise UnauthorizedError("invalid bearer token")
    return key.strip()


def _authorize(key: str, method: str, plane: ControlPlane) -> None:
    """Check what the key may do.

    Raises:
        ForbiddenError: not this.
    """
    permissions = [right for known, right in plane.settings.permissions.items() if hmac.compare_digest(known, key)]
    permission = permissions[0] if permissions else "ALL"
    if permission == "NONE" or (permission == "READ" and method not in _READING):
        raise ForbiddenError("access denied")


def _route(method: str | None, path: str, operation: _Operation) -> Route:
    """Return a route that checks the API key and the rate limit, and answers errors as problems."""

    async def serve(request: Request) -> Response:
        plane: ControlPlane = request.app.state.control_plane
        headers: dict[str, str] = {}
        try:
            key = _authenticate(request)
            try:
                plane.quotas.admit()
                headers = plane.quotas.headers()
            except QuotaExceededError:
                headers = plane.quotas.headers()
                raise
            _authorize(key, request.method, plane)
            response = await operation(request, plane)
        except APIError as error:
            response = ProblemResponse(error)
        response.headers.update(headers)
        return response

    return Route(f"/v2/{path}", serve, methods=[method] if method else ["GET", "POST", "PUT", "PATCH", "DELETE"])


routes = [
    _route("GET", "serverless", list_endpoints),
    _route("POST", "serverless", create_endpoint),
    _route("GET", "serverless/{id}", get_endpoint),
    _route("PATCH", "serverless/{id}", update_endpoint),
    _route("DELETE", "serverless/{id}", delete_endpoint),
    _route("GET", "serverless/{id}/workers", list_workers),
    _route("GET", "serverless/{id}/releases", list_releases),
    _route("GET", "serverless/{id}/workers/{workerId}/logs", stream_logs),
    _route("GET", "templates", list_templates),
    _route("POST", "templates", create_template),
    _route("GET", "templates/{id}", get_template),
    _route("PATCH", "templates/{id}", update_template),
    _route("DELETE", "templates/{id}", delete_template),
    _route("GET", "catalog/gpus", list_gpu_types),
    _route("GET", "catalog/gpus/{id}", get_gpu_type),
    _route("GET", "billing/serverless", list_billing),
    *(_route(None, path, not_found) for root in CONTROL_PLANE_NAMES for path in (root, f"{root}/{{rest:path}}")),
]
