"""What every command has, and how one finds its endpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

from deploy import environment
from deploy.api import KEY_VARIABLE, Api, same_name
from deploy.console import Console
from deploy.errors import OptionError, RefusedError
from deploy.start import POLL_S
from runpod_api.models import Endpoint


@dataclass(frozen=True)
class Context:
    """What every command has.

    Attributes:
        client: of HTTP, with the base URL and the key.
        api: over it.
        console: for the user.
        has_key: whether there is a key.
        dry_run: print the requests that would change something, and send none of them.
        timeout_s: how long a start or a rollout may take.
        poll_s: seconds between two looks at workers or releases.
    """

    client: httpx.AsyncClient
    api: Api
    console: Console
    has_key: bool = True
    dry_run: bool = False
    timeout_s: float = 1800.0
    poll_s: float = POLL_S

    def require_key(self) -> None:
        """Raise RefusedError without a key."""
        if not self.has_key:
            raise RefusedError(f"{KEY_VARIABLE} is not set: export a key of the console, Settings > API Keys")

    def show_request(self, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        """Print a request instead of sending it."""
        self.console.result(f"{method} {str(self.client.base_url).rstrip('/')}{path}")
        if body is not None:
            shown = body | ({"env": environment.masked(body["env"])} if "env" in body else {})
            self.console.result(json.dumps(shown, indent=2, ensure_ascii=False))

    async def find(self, name: str) -> Endpoint | None:
        """Return the endpoint with this name or id, if there is one.

        Raises:
            OptionError: several have this name.
        """
        self.require_key()
        endpoints = await self.api.endpoints()
        for one in endpoints:
            self.console.redaction.add(environment.secrets_in(one.env or {}))
        found = [one for one in endpoints if one.id == name] or [one for one in endpoints if same_name(one.name, name)]
        if len(found) > 1:
            ids = ", ".join(one.id for one in found)
            raise OptionError(f"{len(found)} endpoints are called {name}: give one of their ids, {ids}")
        return found[0] if found else None

    async def get(self, name: str) -> Endpoint:
        """Return the endpoint with this name or id.

        Raises:
            RefusedError: there is none.
        """
        found = await self.find(name)
        if found is None:
            names = sorted(one.name for one in await self.api.endpoints())
            raise RefusedError(f"there is no endpoint {name}; there are {', '.join(names) or 'none'}")
        return found
