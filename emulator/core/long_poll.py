"""Waiting for a queue to change: long polls, status waits, streams."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from starlette.types import Receive

T = TypeVar("T")
# Done when the client has hung up.
HangUp = asyncio.Future[None]


class Waiting:
    """Who waits for which topic; for one event loop."""

    def __init__(self) -> None:
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}

    def wake(self, topic: str) -> None:
        """Let all who wait for the topic look again."""
        for waiter in self._waiters.pop(topic, ()):
            _wake(waiter)

    async def until(self, topic: str, look: Callable[[], T | None], timeout_s: float, hang_up: HangUp) -> T | None:
        """Look at each change of the topic, and once at first, until there is something.

        Returns:
            What `look` returned; None if the time is over or the client has hung up. Nothing is looked for, and so
            nothing is taken, on behalf of a client that is known to be gone.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not hang_up.done():
            found = look()
            left_s = deadline - loop.time()
            if found is not None or left_s <= 0:
                return found
            waiter: asyncio.Future[None] = loop.create_future()
            waiters = self._waiters.setdefault(topic, set())
            waiters.add(waiter)
            wake = partial(_wake, waiter)
            hang_up.add_done_callback(wake)
            time_over = loop.call_later(left_s, wake)
            try:
                await waiter
            finally:
                time_over.cancel()
                hang_up.remove_done_callback(wake)
                waiters.discard(waiter)
                if not waiters and self._waiters.get(topic) is waiters:
                    del self._waiters[topic]
        return None


def _wake(waiter: asyncio.Future[None], *_: object) -> None:
    if not waiter.done():
        waiter.set_result(None)


@asynccontextmanager
async def hang_up_of(receive: Receive) -> AsyncIterator[HangUp]:
    """A future that is done when the client has hung up; the request's body has to be read before."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    listening = asyncio.ensure_future(listen())
    try:
        yield listening
    finally:
        listening.cancel()


def has_hung_up(transport: asyncio.Transport) -> bool:
    """Whether the other side has closed its side of the connection, though the event loop may not have read so yet.

    A TLS transport of uvloop tells it too late: from the end of file on it drops what is written, but it is not closing
    before a later turn.
    """
    connection = transport.get_extra_info("socket")
    if transport.is_closing() or connection is None:
        return True
    with socket.socket(fileno=os.dup(connection.fileno())) as peeked:
        try:
            return not peeked.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
