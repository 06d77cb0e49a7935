"""Templates: one's own, those that belong to an endpoint, and a public one.

Each endpoint has a template of its own, its "bound template", which has its container settings and is deleted with it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from emulator.control_plane.rules import CONTAINER_DEFAULTS, CONTAINER_FIELDS, check_container
from emulator.errors import BadRequestError, NotFoundError

Document = dict[str, Any]
_ID_BYTES: Final = 5
_DEFAULTS: Final[Mapping[str, Any]] = {
    **CONTAINER_DEFAULTS,
    "mounts": {},
    "serverless": False,
    "public": False,
    "category": "NVIDIA",
    "startSsh": True,
    "startJupyter": True,
    "allowedCudaVersions": [],
}
PUBLIC_TEMPLATE: Final[Mapping[str, Any]] = {
    **_DEFAULTS,
    "id": "public-vllm",
    "name": "vLLM",
    "image": "runpod/worker-v1-vllm:stable-cuda12.1.0",
    "serverless": True,
    "public": True,
    "startSsh": False,
    "startJupyter": False,
}
"""A template of the platform's catalog, which all can read and nobody can change."""


@dataclass
class _Template:
    document: Document
    endpoint: str | None = None


class Templates:
    """All templates of the user; bodies have been checked against the description."""

    def __init__(self) -> None:
        self._templates: dict[str, _Template] = {}

    def documents(self) -> list[Document]:
        """Return the user's templates."""
        return [template.document for template in self._templates.values()]

    def get(self, template_id: str) -> Document:
        """Return a template that the user can read.

        Raises:
            NotFoundError: there is none with this id.
        """
        if template_id == PUBLIC_TEMPLATE["id"]:
            return dict(PUBLIC_TEMPLATE)
        return self._own(template_id).document

    def create(self, body: Mapping[str, Any]) -> Document:
        """Add a template.

        Raises:
            BadRequestError: its container settings are malformed.
        """
        check_container(body)
        return self._add(body).document

    def update(self, template_id: str, body: Mapping[str, Any]) -> Document:
        """Change a template; endpoints that were made from it stay as they are.

        Raises:
            BadRequestError: its container settings are malformed.
            NotFoundError: the user has none with this id.
        """
        template = self._own(template_id)
        check_container(body)
        mounts = {**template.document["mounts"], **body.get("mounts", {})}
        template.document = {**template.document, **body, "mounts": mounts}
        return template.document

    def delete(self, template_id: str) -> None:
        """Delete a template.

        Raises:
            BadRequestError: it belongs to an endpoint.
            NotFoundError: the user has none with this id.
        """
        endpoint = self._own(template_id).endpoint
        if endpoint is not None:
            raise BadRequestError(f"template {template_id} is bound to the serverless endpoint {endpoint}")
        del self._templates[template_id]

    def bind(self, endpoint: str, config: Mapping[str, Any]) -> str:
        """Add an endpoint's own template; return its id."""
        container = {name: config[name] for name in CONTAINER_FIELDS}
        body = {"name": f"{config['name']}__template__{endpoint}", "serverless": True, **container}
        template = self._add(body)
        template.endpoint = endpoint
        template_id: str = template.document["id"]
        return template_id

    def follow(self, template_id: str, config: Mapping[str, Any]) -> None:
        """Give an endpoint's own template the endpoint's container settings."""
        self._templates[template_id].document |= {name: config[name] for name in CONTAINER_FIELDS}

    def unbind(self, template_id: str) -> None:
        """Delete an endpoint's own template, with the endpoint."""
        del self._templates[template_id]

    def _add(self, body: Mapping[str, Any]) -> _Template:
        template_id = secrets.token_hex(_ID_BYTES)
        template = _Template({"id": template_id, **_DEFAULTS, **body})
        self._templates[template_id] = template
        return template

    def _own(self, template_id: str) -> _Template:
        if template_id not in self._templates:
            raise NotFoundError(f"template {template_id} not found")
        return self._templates[template_id]
