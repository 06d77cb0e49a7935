"""The sockets that the server listens on: that of `PORT`, and that of `PORT_HEALTH` if it is another."""

from __future__ import annotations

import os
import socket
from typing import Self

from engine.config.settings import Settings
from engine.errors import ConfigurationError

_BACKLOG = 2048


class Listeners:
    """Sockets that listen from the start of the worker to its end, whichever server accepts their connections.

    Args:
        sockets: that listen.
    """

    def __init__(self, sockets: list[socket.socket]) -> None:
        self._sockets = sockets

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Listen on the ports of the settings.

        Raises:
            ConfigurationError: a port is not available.
        """
        sockets: list[socket.socket] = []
        ports = {"PORT": settings.port}
        if settings.port_health not in (None, settings.port):
            ports["PORT_HEALTH"] = settings.port_health
        for name, port in ports.items():
            try:
                sockets.append(_listen(settings.listen_host, port))
            except OSError as error:
                for one in sockets:
                    one.close()
                # Those of name resolution are negative.
                reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else "no address"
                raise ConfigurationError(
                    f"{name}={port}: the worker cannot listen on {settings.listen_host}:{port} ({reason}); set {name} "
                    "to a port that is free, and LISTEN_HOST to an address of this machine"
                ) from None
        for one in sockets:
            # Duplicates share this: one that is made blocking would make the `accept` of all others block.
            one.settimeout(0)
        return cls(sockets)

    def duplicates(self) -> list[socket.socket]:
        """Return the sockets once more, for a server that closes them when it ends."""
        return [one.dup() for one in self._sockets]

    def close(self) -> None:
        """Listen no more, once the duplicates are closed too."""
        for one in self._sockets:
            one.close()


def _listen(host: str, port: int) -> socket.socket:
    """Listen on an address; on `::` also for IPv4, as other servers do."""
    if ":" not in host:
        return socket.create_server((host, port), backlog=_BACKLOG)
    dual = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=dual)
