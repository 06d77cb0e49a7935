"""Bodies of requests and responses: size limits, JSON, and error responses."""

from __future__ import annotations

import json
from typing import Any, Final, cast

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse as _JSONResponse
from starlette.responses import Response

from emulator.errors import APIError, BadRequestError, ContentTooLargeError
from emulator.integers import parse_integer

_ENDPOINT_TYPES: Final = ("QUEUE", "LOAD_BALANCER")
# nginx's status for a client that disconnects before the response.
CLIENT_CLOSED_REQUEST: Final = 499


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the request's body.

    Raises:
        ContentTooLargeError: it exceeds the limit; the rest is not read.
    """
    body = bytearray()
    if (parse_integer(request.headers.get("content-length", "")) or 0) <= max_bytes:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                break
        else:
            return bytes(body)
    raise ContentTooLargeError(f"the body exceeds {max_bytes} bytes")


def parse_json(body: bytes, *, allow_nan: bool = False) -> Any:
    """Return the value of a JSON body.

    Args:
        body: the body.
        allow_nan: accept NaN and the infinities, which JSON does not have, but Python's encoder writes.

    Raises:
        BadRequestError: it is not JSON.
    """
    try:
        return json.loads(body, parse_constant=float if allow_nan else _reject_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def describe_validation_error(error: ValidationError) -> str:
    """Return one line that says what is invalid in a document, without its values."""
    return "; ".join(f"{_path(item['loc'])}: {item['msg']}" for item in error.errors())


def _path(location: tuple[int | str, ...]) -> str:
    """Return where in a document something is; pydantic adds the type of an endpoint, which is not written there."""
    return ".".join(str(part) for part in location if part not in _ENDPOINT_TYPES) or "body"


class JSONResponse(_JSONResponse):
    """JSON in ASCII, so that a lone surrogate that came in as JSON can go out again."""

    def render(self, content: Any) -> bytes:
        """Return the content as JSON."""
        return json.dumps(content, separators=(",", ":")).encode()


def api_error_response(_request: Request, error: Exception) -> JSONResponse:
    """Return the response of the platform's own routes to an `APIError`: `{"error": "..."}`."""
    return JSONResponse({"error": str(error)}, status_code=cast("APIError", error).status)


def http_exception_response(_request: Request, error: Exception) -> JSONResponse:
    """Return the same for an `HTTPException` of Starlette: an unknown path, or another method than the route's."""
    exception = cast("HTTPException", error)
    return JSONResponse({"error": exception.detail}, status_code=exception.status_code, headers=exception.headers)


def client_closed_request(_request: Request, _error: Exception) -> Response:
    """Return the response to a client that disconnected while it sent its request; nobody receives it."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)
