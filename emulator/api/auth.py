"""What every route needs: the emulator behind the request, who is allowed, a body that is not too large."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse as _JSONResponse
from starlette.responses import Response

from emulator.core.endpoint import Endpoint
from emulator.core.faults import Faults
from emulator.errors import InvalidRequestError, NotFoundError, RefusedError, TooLargeError, UnauthorizedError

_CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True)
class Platform:
    """All that the routes act on: `request.app.state.platform`."""

    endpoints: Mapping[str, Endpoint]
    api_keys: tuple[str, ...]
    faults: Faults

    def allows(self, key: str) -> bool:
        """Whether it is one of the API keys; how long the answer takes tells nothing about them."""
        return sum(hmac.compare_digest(key.encode(), known.encode()) for known in self.api_keys) > 0


def platform_of(request: Request) -> Platform:
    """The platform that the request was sent to."""
    platform: Platform = request.app.state.platform
    return platform


def key_of(request: Request) -> str:
    """The key of `Authorization: Bearer KEY` or `Authorization: KEY`; empty without one."""
    value = request.headers.get("authorization", "").strip()
    scheme, _, key = value.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else value


def authorize(request: Request) -> None:
    """Let only clients in that have an API key.

    Raises:
        UnauthorizedError: it has none, or not one of ours.
    """
    if not platform_of(request).allows(key_of(request)):
        raise UnauthorizedError("the request has no valid API key: send it as 'Authorization: Bearer KEY'")


def endpoint_of(request: Request) -> Endpoint:
    """The endpoint that the path names.

    Raises:
        NotFoundError: there is no such endpoint.
    """
    endpoint = platform_of(request).endpoints.get(request.path_params["endpoint"])
    if endpoint is None:
        raise NotFoundError(f"there is no endpoint {request.path_params['endpoint']}")
    return endpoint


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The request's body.

    Raises:
        TooLargeError: it is above the limit; what lies beyond is not read.
    """
    body = bytearray()
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) <= limit_bytes:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit_bytes:
                break
        else:
            return bytes(body)
    raise TooLargeError(f"the body is larger than {limit_bytes} bytes")


def parse_json(body: bytes) -> Any:
    """The body as JSON.

    Raises:
        InvalidRequestError: it is not JSON.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from None


def faults_in(error: ValidationError) -> str:
    """What is wrong with a document, in one line that repeats nothing of it."""
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in error.errors())


def gone(_request: Request, _error: Exception) -> Response:
    """The answer to a client that has left amid its request: nobody reads it."""
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


class JSONResponse(_JSONResponse):
    """JSON in ASCII: whatever came in as JSON can go out again, half a surrogate pair too."""

    def render(self, content: Any) -> bytes:
        """The content, escaped."""
        return json.dumps(content, separators=(",", ":")).encode()


def refusal(_request: Request, error: Exception) -> JSONResponse:
    """A refusal as the platform's own routes answer it: `{"error": "..."}`."""
    status = error.status if isinstance(error, RefusedError) else 500
    return JSONResponse({"error": str(error)}, status_code=status)
