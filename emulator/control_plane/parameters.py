"""Query parameters and headers, checked against the description."""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request

from emulator.control_plane.logs import Cursor, parse_time
from emulator.errors import UnprocessableError
from runpod_api import description

_INTEGER = re.compile(r"-?\d{1,18}")
LAST_EVENT_ID = "Last-Event-ID"


def read_parameters(request: Request, path: str) -> dict[str, Any]:
    """Return those parameters of a GET operation that the request has: integers, lists, texts.

    A time is seconds since 1970, and `Last-Event-ID` a `Cursor`.

    Args:
        request: the request.
        path: the operation's path in the description.

    Raises:
        UnprocessableError: one violates the description.
    """
    values: dict[str, Any] = {}
    errors: list[str] = []
    for pointer, parameter in description.parameters(path).items():
        name, schema = parameter["name"], parameter["schema"]
        texts = request.headers if parameter["in"] == "header" else request.query_params
        text = texts.get(name)
        if text is None:
            continue
        value: Any = text
        if schema.get("type") == "integer" and _INTEGER.fullmatch(text):
            value = int(text)
        elif schema.get("type") == "array":
            value = text.split(",")
        errors += [f"{name}: {line}" for line in description.violations_at(f"{pointer}/schema", value)]
        if schema.get("format") == "date-time":
            value = Cursor.of_event_id(text) if name == LAST_EVENT_ID else parse_time(text)
            if value is None:
                errors.append(f"{name}: {text[:50]!r} is not a time of RFC 3339, such as 2026-06-01T12:05:04Z")
        values[name] = value
    if errors:
        raise UnprocessableError("Request validation failed.", errors)
    return values
