"""The health check that the platform's balancer asks: `GET /ping`.

200: the worker gets requests; 204: it is initializing; anything else: it gets none. Source: docs.runpod.io, "Load
balancing endpoints", "Health checks".
"""

from __future__ import annotations

from enum import Enum
from http import HTTPStatus

from engine.backend.app import Message, Send


class Health(Enum):
    """What the worker is doing, and what the health check answers."""

    LOADING = HTTPStatus.NO_CONTENT
    READY = HTTPStatus.OK
    DRAINING = HTTPStatus.SERVICE_UNAVAILABLE
    """Asked to stop, or failed: it gets nothing new."""


class HealthCheck:
    """Answers the health check; used by the event loop of the load's thread and that of the worker, in this order.

    Args:
        path: of the health check.
        own_port: the port that has nothing but the health check; None if it shares the app's.

    Attributes:
        state: what is answered.
        drain_answers: how many answers have told the balancer that the worker drains.
    """

    def __init__(self, path: str, own_port: int | None = None) -> None:
        self._path = path
        self._own_port = own_port
        self.state = Health.LOADING
        self.drain_answers = 0

    def is_for(self, scope: Message) -> bool:
        """Return whether a request is a health check, or has come to its own port."""
        return self._is_check(scope) or (self._own_port is not None and scope["server"][1] == self._own_port)

    def _is_check(self, scope: Message) -> bool:
        return scope["type"] == "http" and scope["path"] == self._path and scope["method"] in ("GET", "HEAD")

    async def answer(self, scope: Message, send: Send) -> None:
        """Answer a request that is for the health check; 404 for another path on its own port."""
        status = self.state.value if self._is_check(scope) else HTTPStatus.NOT_FOUND
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            self.drain_answers += 1
        # Each check has a connection of its own: none must wait on a server that is about to end.
        headers = [(b"connection", b"close"), (b"cache-control", b"no-store")]
        if status is not HTTPStatus.NO_CONTENT:
            headers.append((b"content-length", b"0"))
        kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
        await send({"type": f"{kind}.start", "status": int(status), "headers": headers})
        await send({"type": f"{kind}.body", "body": b"", "more_body": False})
