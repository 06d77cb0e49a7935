"""What it takes to serve vLLM's app over HTTP: uvicorn, its settings, error responses, and a watch on the engine.

Load-balancing endpoints are served so (`engine.server`), and Spirit's SDK in its proxy mode.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.backend.app import App, Message, Send
from engine.errors import JobError, safe_str
from engine.run_clock import CLOCK

_WATCH_INTERVAL_S = 0.25
# Longer than balancers keep idle connections (Google's: 600 s), so that none is closed just as a request is sent on it.
_KEEP_ALIVE_S = 620

Headers = Iterable[tuple[bytes, bytes]]


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to the worker."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class _Connection(HttpToolsProtocol):
    """uvicorn's connection, which may be idle for as long in time in which the worker runs."""

    def timeout_keep_alive_handler(self) -> None:
        """Close the idle connection; after a freeze, wait again: its timer came due with a request in the buffer."""
        if CLOCK.was_frozen_since(CLOCK.now() - self.timeout_keep_alive):
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        else:
            super().timeout_keep_alive_handler()


def server_config(app: App, **options: Any) -> uvicorn.Config:
    """Return uvicorn's configuration: no lifespan, no logs, and what `options` say."""
    return uvicorn.Config(
        app,
        http=_Connection,
        interface="asgi3",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        # It would count frozen time. A dead peer of a WebSocket is noticed by TCP.
        ws_ping_timeout=None,
        **options,
    )


async def send_error(error: JobError, scope: Message, send: Send, headers: Headers = ()) -> None:
    """Answer a request, or refuse a WebSocket, with an error that has not reached vLLM's app."""
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    body = json.dumps(error.document(), ensure_ascii=False).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": f"{kind}.start", "status": int(error.status), "headers": [*own, *headers]})
    await send({"type": f"{kind}.body", "body": body, "more_body": False})


async def wait_for_failure(failure: Callable[[], str | None]) -> str:
    """Wait until the engine has failed; return the reason."""
    while True:
        try:
            reason = failure()
        except Exception as error:  # noqa: BLE001 (an engine that cannot be watched must not get requests)
            reason = f"the engine's state cannot be read: {safe_str(error)}"
        if reason is not None:
            return reason
        await asyncio.sleep(_WATCH_INTERVAL_S)
