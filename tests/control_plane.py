"""A client of the control plane, that checks each response against RunPod's description."""

from __future__ import annotations

import re
from typing import Any

import httpx

from runpod_api import description

PROBLEM = "application/problem+json"


class ControlPlaneClient:
    """Sends requests to the emulator's control plane.

    Args:
        http: a client with the emulator's URL and an API key.
    """

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def request(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """Send a request; return its response, which is as the description says."""
        if body is not None:
            options["json"] = body
        response = self.http.request(method, f"/v2/{path}", **options)
        check(response)
        return response

    def get(self, path: str, **options: Any) -> Any:
        """Return what a GET answers."""
        return self.request("GET", path, **options).raise_for_status().json()

    def create(self, **changes: Any) -> dict[str, Any]:
        """Create an endpoint; return it."""
        response = self.request("POST", "serverless", create_body(**changes))
        result: dict[str, Any] = response.raise_for_status().json()
        return result

    def patch(self, endpoint: str, **body: Any) -> dict[str, Any]:
        """Change an endpoint; return it."""
        result: dict[str, Any] = self.request("PATCH", f"serverless/{endpoint}", body).raise_for_status().json()
        return result

    def delete(self, endpoint: str) -> None:
        """Delete an endpoint."""
        self.request("DELETE", f"serverless/{endpoint}").raise_for_status()

    def workers(self, endpoint: str) -> dict[str, Any]:
        """Return an endpoint's workers, with their summary."""
        result: dict[str, Any] = self.get(f"serverless/{endpoint}/workers")
        return result

    def releases(self, endpoint: str) -> dict[str, Any]:
        """Return an endpoint's releases, with the rollout."""
        result: dict[str, Any] = self.get(f"serverless/{endpoint}/releases")
        return result


def create_body(**changes: Any) -> dict[str, Any]:
    """Return the body of a valid request for an endpoint, with changes; None leaves a field out."""
    body = {
        "name": "phi-4",
        "type": "QUEUE",
        "image": "me/vllm:1",
        "gpu": {"pools": ["ADA_24"]},
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": 1},
        **changes,
    }
    return {name: value for name, value in body.items() if value is not None}


def check(response: httpx.Response) -> None:
    """Fail unless the response's status, headers and body are those of the description."""
    operation = _operation(response.request)
    described = operation["responses"].get(str(response.status_code), operation["responses"]["default"])
    if "$ref" in described:
        described = description.document()["components"]["responses"][described["$ref"].rpartition("/")[2]]
    content = described.get("content", {})
    if not content:
        assert response.content == b""
        return
    ((media_type, media),) = content.items()
    assert response.headers["content-type"].partition(";")[0] == media_type
    if media_type == "text/event-stream":
        return
    schema = media["schema"]["$ref"].rpartition("/")[2]
    assert description.violations(schema, response.json()) == []
    if media_type == PROBLEM:
        assert response.json()["status"] == response.status_code


def _operation(request: httpx.Request) -> dict[str, Any]:
    for path, methods in description.document()["paths"].items():
        pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path))
        if re.fullmatch(pattern, request.url.path):
            operation: dict[str, Any] = methods[request.method.lower()]
            return operation
    raise KeyError(request.url.path)
