"""The emulator's own routes: faults, workers to kill, and the page."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from emulator.api.auth import JSONResponse, authorize, faults_in, parse_json, platform_of, read_body
from emulator.core.faults import FaultSettings
from emulator.errors import InvalidRequestError, NotFoundError

PAGE = Path(__file__).parents[1] / "page"
_FAULTS_BYTES = 1_000_000
# It may load from here and nowhere else, and nobody may put it into a page of theirs.
_POLICY = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
# A browser asks whether there is a newer one: a page of one version does not work with modules of another.
_ASK_AGAIN = {"Cache-Control": "no-cache"}


class _PageFiles(StaticFiles):
    """The files that the page loads."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_ASK_AGAIN)
        return response


async def show_faults(request: Request) -> Response:
    """GET /faults: the faults that are on, and how often each rule has struck."""
    authorize(request)
    return JSONResponse(platform_of(request).faults.document())


async def set_faults(request: Request) -> Response:
    """PUT /faults: replace all faults; `{}` ends them."""
    authorize(request)
    value = parse_json(await read_body(request, _FAULTS_BYTES))
    try:
        settings = FaultSettings.model_validate(value)
    except ValidationError as error:
        raise InvalidRequestError(faults_in(error)) from None
    faults = platform_of(request).faults
    faults.set(settings)
    return JSONResponse(faults.document())


async def kill_worker(request: Request) -> Response:
    """POST /workers/{id}/kill: kill a worker, as a machine that fails would."""
    authorize(request)
    worker = request.path_params["worker"]
    for endpoint in platform_of(request).endpoints.values():
        if endpoint.fleet.started_here(worker):
            endpoint.fleet.kill(worker)
            return JSONResponse({"id": worker, "killed": True})
    raise NotFoundError(f"there is no worker {worker} that was started here")


async def index(_request: Request) -> Response:
    """GET /: the page."""
    return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _POLICY, **_ASK_AGAIN})


routes: list[BaseRoute] = [
    Route("/", index),
    Route("/faults", show_faults),
    Route("/faults", set_faults, methods=["PUT"]),
    Route("/workers/{worker}/kill", kill_worker, methods=["POST"]),
    Mount("/page", _PageFiles(directory=PAGE)),
]
