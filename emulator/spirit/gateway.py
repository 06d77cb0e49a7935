"""The platform's own API for clients (API.md): `/v1/{serverless-id}/sync`, `/async` and `/status`.

A path whose first segment is no known id is a proxied request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from emulator.api.auth import context_of
from emulator.api.bodies import CLIENT_CLOSED_REQUEST, JSONResponse, parse_json, read_body
from emulator.core.long_poll import client_disconnect
from emulator.errors import (
    BadRequestError,
    ContentTooLargeError,
    HandlingError,
    NotFoundError,
    RequestTimeoutError,
    UnauthorizedError,
    UnavailableError,
)
from emulator.integers import parse_integer
from emulator.spirit.endpoint import SpiritEndpoint
from emulator.spirit.proxy import proxied
from emulator.spirit.task import unknown_status_document
from emulator.spirit.task_queue import task_topic

_MAX_TTL_MS: Final = 24 * 60 * 60 * 1000
# The texts of API.md, "Error".
_BODY_TOO_LARGE: Final = "request body too large"
_NOT_A_REQUEST: Final = "invalid request data, must be a json object with 'input' and 'webhook' (optional)"
_NO_WEBHOOK: Final = "webhook is empty for async request"
_INVALID_ARGUMENTS: Final = "invalid request arguments"
_NO_GPU: Final = "not enough gpu now, please try again later"
_TIMEOUT: Final = "request timeout"
_NOT_CANCELLED: Final = "failed to cancel message(s)"

_Operation = Callable[[Request, SpiritEndpoint], Awaitable[Response]]


async def sync(request: Request, endpoint: SpiritEndpoint) -> Response:
    """POST sync: queue a task and answer with its result."""
    body, document = await _read_request(request, endpoint)
    if not endpoint.can_serve():
        raise UnavailableError(_NO_GPU)
    ttl_s = endpoint.settings.sync_ttl_s
    task = endpoint.queue.submit("sync", "sync", body, ttl_s, document.get("webhook") or "")

    def poll() -> int | None:
        return task.result_status

    async with client_disconnect(request.receive) as disconnect:
        status = await endpoint.long_poll.wait_for(task_topic(task.id), poll, ttl_s, disconnect)
        if disconnect.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    if status in (None, HTTPStatus.REQUEST_TIMEOUT):
        raise RequestTimeoutError(_TIMEOUT)
    if status != HTTPStatus.OK or task.result is None:
        raise HandlingError(f"failed to handle message {task.id}: {task.message}")
    return Response(task.result, media_type="application/json")


async def submit(request: Request, endpoint: SpiritEndpoint) -> Response:
    """POST async: queue a task whose worker posts its result to the webhook."""
    body, document = await _read_request(request, endpoint)
    webhook = document.get("webhook")
    if not webhook:
        raise BadRequestError(_NO_WEBHOOK)
    ttl_s = endpoint.settings.async_ttl_s
    policy = document.get("policy") or {}
    if not isinstance(policy, dict):
        raise BadRequestError(_INVALID_ARGUMENTS)
    if "ttl" in policy:
        ttl_ms = policy["ttl"]
        if isinstance(ttl_ms, bool) or not isinstance(ttl_ms, int | float) or not 0 < ttl_ms < _MAX_TTL_MS:
            raise BadRequestError(_INVALID_ARGUMENTS)
        ttl_s = ttl_ms / 1000
    task = endpoint.queue.submit("async", "async", body, ttl_s, webhook)
    return JSONResponse({"id": task.id, "sequence": str(task.sequence)})


async def status(request: Request, endpoint: SpiritEndpoint) -> Response:
    """GET status: how many tasks wait, or with `requestID` the state of one."""
    if "requestID" in request.query_params:
        return JSONResponse(_status(endpoint, request.query_params["requestID"]))
    return JSONResponse({"queueingCount": endpoint.queue.in_queue})


async def statuses(request: Request, endpoint: SpiritEndpoint) -> Response:
    """POST status: the states of several tasks."""
    try:
        document = parse_json(await _read_body(request, endpoint))
    except BadRequestError:
        raise BadRequestError(_INVALID_ARGUMENTS) from None
    ids = document.get("requestIDs") if isinstance(document, dict) else None
    if not isinstance(ids, list) or not all(isinstance(task_id, str) for task_id in ids):
        raise BadRequestError(_INVALID_ARGUMENTS)
    return JSONResponse({"statuses": [_status(endpoint, task_id) for task_id in ids]})


async def cancel(request: Request, endpoint: SpiritEndpoint) -> Response:
    """DELETE async: with `requestID` and `sequence`, cancel a task that waits; without, all async ones that wait."""
    query = request.query_params
    operation = str(uuid4())
    if not query:
        return JSONResponse({"id": operation, "cleaned": endpoint.queue.clean()})
    sequence = parse_integer(query.get("sequence", ""))
    if sequence is None or not query.get("requestID"):
        raise BadRequestError(_INVALID_ARGUMENTS)
    try:
        endpoint.queue.cancel(query["requestID"], sequence)
    except NotFoundError:
        raise HandlingError(_NOT_CANCELLED) from None
    return JSONResponse({"id": operation})


def _status(endpoint: SpiritEndpoint, task_id: str) -> dict[str, Any]:
    task = endpoint.queue.task(task_id)
    name = endpoint.settings.id
    return unknown_status_document(name, task_id) if task is None else task.status_document(name)


async def _read_request(request: Request, endpoint: SpiritEndpoint) -> tuple[bytes, dict[str, Any]]:
    """Return the body of a request, as it came and parsed."""
    body = await _read_body(request, endpoint)
    try:
        document = parse_json(body)
    except BadRequestError:
        raise BadRequestError(_NOT_A_REQUEST) from None
    if not isinstance(document, dict) or "input" not in document:
        raise BadRequestError(_NOT_A_REQUEST)
    if not isinstance(document.get("webhook") or "", str):
        raise BadRequestError(_NOT_A_REQUEST)
    return body, document


async def _read_body(request: Request, endpoint: SpiritEndpoint) -> bytes:
    try:
        return await read_body(request, endpoint.settings.max_body_bytes)
    except ContentTooLargeError:
        raise BadRequestError(_BODY_TOO_LARGE) from None


def _route(path: str, operation: _Operation, method: str) -> Route:
    """Return a route of known services, which checks the API key."""

    async def serve(request: Request) -> Response:
        context = context_of(request)
        endpoint = context.endpoints.get(request.path_params["serverless"])
        if not isinstance(endpoint, SpiritEndpoint):
            return await proxied(request)
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not context.is_api_key(key.strip()):
            raise UnauthorizedError("no valid API key; send 'Authorization: Bearer KEY'")
        return await operation(request, endpoint)

    return Route("/v1/{serverless}/" + path, serve, methods=[method])


routes = [
    _route("sync", sync, "POST"),
    _route("async", submit, "POST"),
    _route("async", cancel, "DELETE"),
    _route("status", status, "GET"),
    _route("status", statuses, "POST"),
]
