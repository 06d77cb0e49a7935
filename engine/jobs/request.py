"""One request to vLLM's app, and the request that a client's HTTP request becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.backend import merging
from engine.errors import RouteNotAllowedError, UnknownRouteError
from engine.jobs.request_body import encode_json, model_of, read_body
from engine.json_codec import decode

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Request:
    """One call of vLLM's app.

    Attributes:
        method: GET or POST.
        path: of the route.
        query: of the route, or empty.
        body: JSON or a form, or None for a GET.
        content_type: of the body.
        form: fields of a form that is not encoded yet (`engine.jobs.multipart`), or None.
        native: whether the job is in the top-level format, whose stream is dicts with the new text, not SSE text.
        warnings: what was ignored, for the client and the log.
        mergeable: whether vLLM may put several tokens into one event, as in a stream of plain text.
        proxied: whether the outputs are the answer as it is (`engine.jobs.proxied`).
        model: that the body names; a client's own word.
        wants_costs: whether the answer should say what the job cost (`engine.jobs.cost_report`).
        traceparent: of the client's trace.
    """

    method: str
    path: str
    query: str = ""
    body: bytes | None = None
    content_type: str = JSON
    form: dict[str, Any] | None = None
    native: bool = False
    warnings: tuple[str, ...] = ()
    mergeable: bool = False
    proxied: bool = False
    model: str | None = None
    wants_costs: bool = False
    traceparent: str | None = None


def http_request(  # noqa: PLR0913 (all that a request has)
    method: str, path: str, query: str, body: bytes, event_tokens: Callable[[str], int | None], *, request_id: str = ""
) -> Request:
    """Return the request as its client wrote it, in today's names. Whether its body is valid is for vLLM to say.

    Args:
        method: any of HTTP's.
        path: of the route.
        query: of the route, or empty.
        body: as it came; it is only changed if it is a JSON object with fields that have another name today, or on a
            route that takes the id from it.
        event_tokens: returns how many tokens an event of a stream of plain text should have on a route; None where each
            token must be an event of its own.
        request_id: names the request in vLLM.

    Raises:
        InvalidInputError: fields of another name are where they cannot be used.
    """
    try:
        document = decode(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        return Request(method, path, query, body or None, proxied=True)
    current, own = read_body(path, document, request_id)
    # Its client gets each token as an event, unless it is slower than the engine, as with vLLM's own server.
    mergeable = merging.is_plain_text(path, current) and event_tokens(path) is not None
    return Request(
        method,
        path,
        query,
        body if current == document else encode_json(current),
        warnings=own.warnings,
        mergeable=mergeable,
        proxied=True,
        model=model_of(current),
        wants_costs=own.wants_costs,
        traceparent=own.traceparent,
    )


def check_route(path: str, open_routes: frozenset[str], has_route: Callable[[str], bool]) -> None:
    """Check that clients may call a route.

    Raises:
        RouteNotAllowedError: they may not.
        UnknownRouteError: vLLM has no such route.
    """
    if path not in open_routes:
        raise RouteNotAllowedError(path, sorted(open_routes)) if has_route(path) else UnknownRouteError(path)
