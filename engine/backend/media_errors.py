"""Says of a URL that could not be fetched whether another attempt may succeed, and if not, what to change."""

from __future__ import annotations

import socket
from http import HTTPStatus

import aiohttp

from engine.errors import safe_str

# Answers of a server that is busy, which vLLM itself tries again.
_BUSY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
_UNKNOWN_HOST = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


def fetch_failure(error: Exception) -> Exception | None:
    """Return the error of vLLM's that a request with such a URL should end with; None to leave it as it is.

    vLLM answers with 500 whatever its attempts end with, unless it is the URL's fault. Here it is 504 if the URL's
    server did not answer in time, 502 if it fails, is busy or cannot be reached, and 422 if it would refuse again.
    None of them has the URL, which may hold a signature or a password.

    Args:
        error: of vLLM's media connector, or of aiohttp.
    """
    from vllm.exceptions import GracefulHTTPError, VLLMUnprocessableEntityError

    # vLLM has its own error of what it takes for the URL's fault.
    cause = error.__cause__ if isinstance(error, VLLMUnprocessableEntityError) else error
    status, advice = HTTPStatus.BAD_GATEWAY, "try again later"
    match cause:
        case TimeoutError():
            status, reason = HTTPStatus.GATEWAY_TIMEOUT, "did not answer in time"
        case aiohttp.ClientResponseError(status=answer):
            reason = f"answered with status {answer}"
            if answer < HTTPStatus.INTERNAL_SERVER_ERROR and answer not in _BUSY:
                status = HTTPStatus.UNPROCESSABLE_ENTITY
                advice = "check the URL, and that it can be read without a login"
        case aiohttp.ClientConnectorDNSError(os_error=os_error) if os_error.errno in _UNKNOWN_HOST:
            status, reason, advice = HTTPStatus.UNPROCESSABLE_ENTITY, "is not known by its name", "check the URL"
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientSSLError():
            status, advice = HTTPStatus.UNPROCESSABLE_ENTITY, "use another URL"
            reason = f"has no valid certificate ({safe_str(cause)})"
        case aiohttp.ClientConnectionError() | aiohttp.ClientPayloadError() | ConnectionError():
            reason = f"cannot be reached, or has closed the connection ({safe_str(cause)})"
        case _:
            return None
    message = f"the URL's server {reason}: {advice}"
    failure: Exception = GracefulHTTPError(message, status)
    if status is HTTPStatus.UNPROCESSABLE_ENTITY:
        failure = VLLMUnprocessableEntityError(message, parameter="image_url")
    return failure
