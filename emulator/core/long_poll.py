"""Waiting for a queue to change: workers' long polls, /runsync, /stream and the gateway's streams."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from starlette.types import Receive

T = TypeVar("T")
# Done when the client has disconnected.
Disconnect = asyncio.Future[None]


class LongPoll:
    """Waits for changes of topics; for one event loop."""

    def __init__(self) -> None:
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}

    def notify(self, topic: str) -> None:
        """Make everyone who waits for the topic poll again."""
        for waiter in self._waiters.pop(topic, ()):
            _wake(waiter)

    async def wait_for(
        self, topic: str, poll: Callable[[], T | None], timeout_s: float, disconnect: Disconnect
    ) -> T | None:
        """Call `poll` now and after each change of the topic, until it returns a value.

        Returns:
            The value; None after the timeout, or if the client has disconnected. `poll`, which may take jobs, is not
            called for a client that is known to have disconnected.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not disconnect.done():
            value = poll()
            remaining_s = deadline - loop.time()
            if value is not None or remaining_s <= 0:
                return value
            waiter: asyncio.Future[None] = loop.create_future()
            waiters = self._waiters.setdefault(topic, set())
            waiters.add(waiter)
            wake = partial(_wake, waiter)
            disconnect.add_done_callback(wake)
            timer = loop.call_later(remaining_s, wake)
            try:
                await waiter
            finally:
                timer.cancel()
                disconnect.remove_done_callback(wake)
                waiters.discard(waiter)
                if not waiters and self._waiters.get(topic) is waiters:
                    del self._waiters[topic]
        return None


def _wake(waiter: asyncio.Future[None], *_: object) -> None:
    if not waiter.done():
        waiter.set_result(None)


@asynccontextmanager
async def client_disconnect(receive: Receive) -> AsyncIterator[Disconnect]:
    """Provide a future that is done when the client disconnects; the request's body must have been read."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    listener = asyncio.ensure_future(listen())
    try:
        yield listener
    finally:
        listener.cancel()


def is_disconnected(transport: asyncio.Transport) -> bool:
    """Return whether the peer has closed its side of the connection, even if the event loop has not read that yet.

    A TLS transport of uvloop reports it too late: from the end of file on it drops what is written, but `is_closing`
    is false until a later iteration of the loop.
    """
    connection = transport.get_extra_info("socket")
    if transport.is_closing() or connection is None:
        return True
    if sys.platform == "linux":
        # Also if the peer sent bytes before that nobody has read, such as TLS's close_notify.
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLRDHUP)
        return bool(poller.poll(0))
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        try:
            return not duplicate.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
