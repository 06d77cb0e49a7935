"""What the user of `deploy` reads when RunPod's API refuses a request: a table, from real requests to the emulator.

    python -m tests.deploy_errors docs/deploy-errors.md

The requests are those that provoke each documented refusal (tests/unit/emulator/control_plane/test_refusals.py), as far
as `deploy` has the operation. The table is between the marks `<!-- refusals -->` and `<!-- /refusals -->`.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from deploy import api
from deploy.errors import DeployError
from emulator.app import run_in_thread
from emulator.settings import EmulatorSettings
from runpod_api.description import violations
from tests.control_plane import ControlPlaneClient, create_body
from tests.unit.emulator.control_plane.test_refusals import CASES, Case, make_ids

_KEY, _READ_KEY = "a-key", "a-key-for-reading"
_MARKED = re.compile(r"(<!-- refusals -->\n).*?(<!-- /refusals -->)", re.DOTALL)
_SCHEMAS = {"POST": "CreateEndpointRequest", "PATCH": "UpdateEndpointRequest"}


def table() -> str:
    """Return the table: status, request, line."""
    rows = ["| Status | Request | Line |", "| --- | --- | --- |"]
    for status, request, line in sorted(dict.fromkeys(_refusals()), key=lambda row: row[0]):
        rows.append(f"| {status} | {_code(request)} | {_code(line)} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """Return a document's text with the current table between its marks."""
    return _MARKED.sub(lambda match: f"{match[1]}{table()}\n{match[2]}", text)


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _refusals() -> Iterator[tuple[int, str, str]]:
    settings: dict[str, Any] = {
        "port": 0, "apiKeys": [_KEY, _READ_KEY], "endpoints": [],
        "controlPlane": {"rateLimits": None, "permissions": {_READ_KEY: "READ"}},
    }  # fmt: skip
    with run_in_thread(EmulatorSettings.model_validate(settings)) as emulator:
        for key, status in (("another-key", 401), (_READ_KEY, 403)):
            yield status, "POST serverless", _line(emulator.url, key, "POST", "serverless", create_body())
        headers = {"Authorization": f"Bearer {_KEY}"}
        with httpx.Client(base_url=emulator.url, headers=headers) as http:
            plane = ControlPlaneClient(http)
            ids = make_ids(plane)
            for case in CASES:
                if (row := _refusal(emulator.url, ids, case)) is not None:
                    yield row
    settings["controlPlane"]["rateLimits"] = {"minute": 1}
    with (
        run_in_thread(EmulatorSettings.model_validate(settings)) as emulator,
        patch.object(api, "MAX_RETRY_AFTER_S", 0),
    ):
        httpx.get(f"{emulator.url}/v2/serverless", headers={"Authorization": f"Bearer {_KEY}"}).raise_for_status()
        yield HTTPStatus.TOO_MANY_REQUESTS, "GET serverless", _line(emulator.url, _KEY, "GET", "serverless")


def _refusal(url: str, ids: dict[str, str], case: Case) -> tuple[int, str, str] | None:
    status, method, path, body, _ = case
    place, _, query = path.partition("?")
    is_sent = place.startswith("serverless") and re.fullmatch(r"(tail=-?\d+)?", query)
    if not is_sent or (place.endswith("/logs") and status == HTTPStatus.NOT_FOUND):
        return None  # deploy has no such request, or takes it for the end of a log
    if isinstance(body, dict) and body.get("templateId") in ids:
        body = {**body, "templateId": ids[body["templateId"]]}
    real = "/".join(ids.get(part, part) for part in path.split("/"))
    line = _line(url, _KEY, method, real, body)
    not_sent = method in _SCHEMAS and bool(violations(_SCHEMAS[method], body))
    for name, endpoint_id in ids.items():
        line = line.replace(endpoint_id, name)
    return status, f"{method} {path}{_changes(method, case[3])}", f"{line}{' (not sent)' if not_sent else ''}"


def _changes(method: str, body: Any) -> str:
    """Return what a body has that is not as in a valid one; null where something is missing."""
    if body is None:
        return ""
    if method != "POST" or not isinstance(body, dict):
        return f" {json.dumps(body)}"
    valid = create_body()
    changes = {name: body.get(name) for name in {**valid, **body} if body.get(name) != valid.get(name)}
    return f" {json.dumps(changes)}"


def _line(url: str, key: str, method: str, path: str, body: Any = None) -> str:
    """Return the line for one request, as the command makes it."""

    async def ask() -> str:
        async with api.client(url, key) as http:
            try:
                await _operation(api.Api(http, lambda _: None, wait_s=0), method, path, body)
            except DeployError as error:
                return str(error)
        raise AssertionError(f"{method} {path} is not refused")

    return asyncio.run(ask())


def _operation(calls: api.Api, method: str, path: str, body: Any) -> Awaitable[Any]:  # noqa: PLR0911 (a table)
    place, _, query = path.partition("?")
    match method, place.split("/")[1:]:
        case "POST", []:
            return calls.create(body)
        case "GET", []:
            return calls.endpoints()
        case "GET", [endpoint]:
            return calls.endpoint(endpoint)
        case "PATCH", [endpoint]:
            return calls.update(endpoint, body)
        case "DELETE", [endpoint]:
            return calls.delete(endpoint)
        case "GET", [endpoint, "workers"]:
            return calls.workers(endpoint)
        case "GET", [endpoint, "releases"]:
            return calls.releases(endpoint)
        case "GET", [endpoint, "workers", worker, "logs"]:
            return _first(calls.logs(endpoint, worker, tail=int(query.partition("=")[2] or 0), pause_s=0))
    raise AssertionError(f"deploy has no {method} {path}")


async def _first(lines: Any) -> None:
    async for _ in lines:
        return


def main() -> None:
    """Rewrite the documents that the command line names."""
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
