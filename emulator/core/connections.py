"""The connections of workers, so that a worker's can be dropped."""

from __future__ import annotations

import asyncio


class WorkerConnections:
    """The connections on which workers have sent requests."""

    def __init__(self) -> None:
        self._transports: dict[str, set[asyncio.Transport]] = {}

    def add(self, worker: str, transport: asyncio.Transport) -> None:
        """Record that a worker has sent a request on a connection."""
        transports = self._transports.setdefault(worker, set())
        if transport not in transports:
            transports -= {one for one in transports if one.is_closing()}
            transports.add(transport)

    def drop(self, worker: str) -> None:
        """Close all connections of a worker, without an answer to what it has asked on them."""
        for transport in self._transports.pop(worker, ()):
            transport.abort()

    def forget(self, worker: str) -> None:
        """Forget a worker that has exited."""
        self._transports.pop(worker, None)
