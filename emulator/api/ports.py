"""Ports besides the emulator's own, each of which is an identity: a load-balancing endpoint's, or a worker's agent's.

A port listens as soon as it is opened, and is served once the emulator is. uvicorn serves the sockets that it was
started with; these come and go with endpoints and workers, so they are served by its protocol directly.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from ssl import SSLContext

import uvicorn
from uvicorn.server import ServerState

from emulator.api.fault_middleware import DroppableProtocol

HOST = "127.0.0.1"


@dataclass(eq=False)
class _Port:
    """One port."""

    endpoint: str
    worker: str
    socket: socket.socket
    starting: asyncio.Task[None] | None = None
    server: asyncio.Server | None = field(default=None)


class Ports:
    """Ports that one app serves.

    Args:
        host: the address that they listen on.
        ssl: with TLS, its context.
    """

    def __init__(self, host: str = HOST, ssl: SSLContext | None = None) -> None:
        self._host = host
        self._ssl = ssl
        self._ports: dict[int, _Port] = {}
        self._config: uvicorn.Config | None = None
        self._state = ServerState()

    def open(self, endpoint: str, worker: str = "", port: int = 0) -> int:
        """Listen for a worker of an endpoint, or for the endpoint itself; return the port.

        Raises:
            OSError: the port is not available.
        """
        listener = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._host, port))
            listener.listen(128)
        except OSError:
            listener.close()
            raise
        number: int = listener.getsockname()[1]
        opened = self._ports[number] = _Port(endpoint, worker, listener)
        if self._config is not None:
            opened.starting = asyncio.ensure_future(self._serve(opened, self._config))
        return number

    def close(self, owner: str) -> None:
        """Close the port of a worker, or of an endpoint; connections that exist end with their peers."""
        for number in [number for number, port in self._ports.items() if owner in (port.worker, port.endpoint)]:
            port = self._ports.pop(number)
            if port.server is not None:
                port.server.close()
            elif port.starting is not None:
                port.starting.cancel()
            port.socket.close()

    def owner(self, port: int) -> tuple[str, str]:
        """Return the endpoint and the worker of a port; empty ones if its worker has exited."""
        owner = self._ports.get(port)
        return ("", "") if owner is None else (owner.endpoint, owner.worker)

    def urls(self, endpoint: str) -> dict[str, str]:
        """Return the URLs of an endpoint's ports, by worker."""
        return {
            port.worker: f"http://{self._host}:{number}"
            for number, port in self._ports.items()
            if port.endpoint == endpoint
        }

    def start(self, config: uvicorn.Config, state: ServerState) -> None:
        """Serve all ports, and those that are opened later.

        Args:
            config: uvicorn's configuration, with the app.
            state: connections are added to it, for the server that shuts down.
        """
        config.load()
        self._config, self._state = config, state
        for port in self._ports.values():
            port.starting = asyncio.ensure_future(self._serve(port, config))

    def stop(self) -> None:
        """Close all ports."""
        self._config = None
        for port in list(self._ports.values()):
            self.close(port.endpoint)

    async def _serve(self, port: _Port, config: uvicorn.Config) -> None:
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            return DroppableProtocol(config=config, server_state=self._state, app_state={}, _loop=loop)

        with suppress(OSError):  # Closed in the meantime.
            port.server = await loop.create_server(protocol, sock=port.socket, ssl=self._ssl)
