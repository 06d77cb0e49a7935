"""The emulator's own routes: faults, killing and freezing workers, and the web page."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from emulator.api.auth import authorize, context_of
from emulator.api.bodies import JSONResponse, describe_validation_error, parse_json, read_body
from emulator.core.faults import FaultSettings
from emulator.core.fleet import Fleet
from emulator.errors import BadRequestError, NotFoundError

PAGE_DIRECTORY = Path(__file__).parents[1] / "page"
_MAX_FAULTS_BYTES = 1_000_000
# The page loads nothing from other origins, and no other page may frame it.
_CONTENT_SECURITY_POLICY = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
# Browsers must revalidate: a page of one version does not work with modules of another.
_REVALIDATE = {"Cache-Control": "no-cache"}


class _PageFiles(StaticFiles):
    """The files that the page loads."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_REVALIDATE)
        return response


async def get_faults(request: Request) -> Response:
    """GET /faults: the active faults, and how often each was injected."""
    authorize(request)
    return JSONResponse(context_of(request).faults.document())


async def put_faults(request: Request) -> Response:
    """PUT /faults: replace all faults; `{}` removes them."""
    authorize(request)
    value = parse_json(await read_body(request, _MAX_FAULTS_BYTES))
    try:
        settings = FaultSettings.model_validate(value)
    except ValidationError as error:
        raise BadRequestError(describe_validation_error(error)) from None
    context = context_of(request)
    try:
        context.faults.set(settings)
    except ValueError as error:
        raise BadRequestError(str(error)) from None
    for endpoint in context.endpoints.values():
        endpoint.forget_duplicates()
    return JSONResponse(context.faults.document())


async def kill_worker(request: Request) -> Response:
    """POST /workers/{id}/kill: kill a worker, to simulate the failure of its machine."""
    authorize(request)
    worker = request.path_params["worker"]
    _fleet_of(request, worker).kill(worker)
    return JSONResponse({"id": worker, "killed": True})


class Freeze(BaseModel):
    """The body of /workers/{id}/freeze; it may be empty."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    drops_connections: bool = Field(default=True, alias="dropConnections")


async def freeze_worker(request: Request) -> Response:
    """POST /workers/{id}/freeze: freeze a worker at any moment, until it is thawed by request."""
    authorize(request)
    body = await read_body(request, _MAX_FAULTS_BYTES)
    try:
        freeze = Freeze.model_validate(parse_json(body) if body else {})
    except ValidationError as error:
        raise BadRequestError(describe_validation_error(error)) from None
    worker = request.path_params["worker"]
    _fleet_of(request, worker).freeze(worker, "on request", drops_connections=freeze.drops_connections, is_held=True)
    return JSONResponse({"id": worker, "frozen": True})


async def thaw_worker(request: Request) -> Response:
    """POST /workers/{id}/thaw: let a frozen worker go on."""
    authorize(request)
    worker = request.path_params["worker"]
    _fleet_of(request, worker).thaw(worker)
    return JSONResponse({"id": worker, "frozen": False})


def _fleet_of(request: Request, worker: str) -> Fleet:
    for endpoint in context_of(request).endpoints.values():
        if endpoint.fleet.is_managed(worker):
            return endpoint.fleet
    raise NotFoundError(f"there is no managed worker {worker}")


async def index(_request: Request) -> Response:
    """GET /: the page."""
    headers = {"Content-Security-Policy": _CONTENT_SECURITY_POLICY, **_REVALIDATE}
    return FileResponse(PAGE_DIRECTORY / "index.html", headers=headers)


routes: list[BaseRoute] = [
    Route("/", index),
    Route("/faults", get_faults),
    Route("/faults", put_faults, methods=["PUT"]),
    Route("/workers/{worker}/kill", kill_worker, methods=["POST"]),
    Route("/workers/{worker}/freeze", freeze_worker, methods=["POST"]),
    Route("/workers/{worker}/thaw", thaw_worker, methods=["POST"]),
    Mount("/page", _PageFiles(directory=PAGE_DIRECTORY)),
]
