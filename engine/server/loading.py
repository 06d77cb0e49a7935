"""Answers the health check while the engine loads, which blocks the main thread for as long as the model needs.

vLLM's processes must be forked by the main thread (`engine.child_processes`), so the server is in another one. It
accepts on duplicates of the sockets on which the worker's own server goes on: no connection is refused in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from typing import Self

from engine.backend.app import Message, Receive, Send
from engine.errors import LoadingError
from engine.jobs.http_server import Server, send_error, server_config
from engine.run_clock import CLOCK
from engine.server.health_check import HealthCheck
from engine.server.listeners import Listeners

_RETRY_AFTER = (b"retry-after", b"5")
# How long connections that were accepted last may take to be answered.
_CLOSE_TIMEOUT_S = 1.0
_START_TIMEOUT_S = 10.0


class LoadingServer:
    """Serves the health check from a thread: `with LoadingServer(...) as loading: ... await loading.hand_over()`.

    Args:
        listeners: are accepted on.
        health: is answered.
    """

    def __init__(self, listeners: Listeners, health: HealthCheck) -> None:
        self._health = health
        self._listeners = listeners
        self._sockets = listeners.duplicates()
        self._server = _ClosingServer(server_config(self._answer, loop="asyncio", ws="none"))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="health check", daemon=True)

    def __enter__(self) -> Self:
        """Start; return once the health check is answered, as no process may be forked while this imports."""
        os.register_at_fork(after_in_child=self._close_in_child)
        self._thread.start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._server.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._server.should_exit = True
        self._thread.join()

    async def hand_over(self) -> None:
        """Accept no more connections, as another server does now; those that are open are answered."""
        loop = self._loop
        if loop is not None and self._thread.is_alive():
            stopped = asyncio.run_coroutine_threadsafe(self._server.stop_accepting(), loop)
            await asyncio.wrap_future(stopped)
        self._server.should_exit = True

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(self._sockets)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        del receive
        if self._health.is_for(scope):
            await self._health.answer(scope, send)
        else:
            error = LoadingError("the worker loads its model; try again in a few seconds")
            await send_error(error, scope, send, [_RETRY_AFTER, (b"connection", b"close")])

    def _close_in_child(self) -> None:
        """Close what a forked process has of the sockets: it must not keep the port open when the worker has gone."""
        self._listeners.close()
        for listener in self._sockets:
            listener.close()
        for connection in self._server.server_state.connections:
            if connection.transport is not None:
                accepted = connection.transport.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    os.close(accepted.fileno())


class _ClosingServer(Server):
    """Answers the connections that it has accepted before it closes them."""

    async def stop_accepting(self) -> None:
        """Accept no more.

        asyncio drops a connection, without closing it, whose server is closed right after it was accepted. So the
        sockets are only no longer watched here.
        """
        loop = asyncio.get_running_loop()
        for server in self.servers:
            for listener in server.sockets:
                loop.remove_reader(listener.fileno())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.stop_accepting()
        deadline = CLOCK.now() + _CLOSE_TIMEOUT_S
        await asyncio.sleep(0.05)  # An accepted connection is counted one turn of the event loop later.
        while self.server_state.connections and CLOCK.now() < deadline:  # noqa: ASYNC110 (uvicorn sends no event)
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)
