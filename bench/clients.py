"""Clients that cost next to nothing: they write down what comes and when, and read it only after the load is over.

They share the processor with the servers that they measure. So each request is a connection of its own that the server
closes at the end (`Connection: close`): nothing has to be understood to know when an answer is over.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

# A request that has not ended by then is given up and counted as an error.
LIMIT_S = 300.0
# A server that refuses at once would otherwise be asked thousands of times a second.
_AFTER_REFUSAL_S = 0.1


@dataclass(frozen=True)
class Address:
    """Where a server answers chats: its port on this machine and the path of its route."""

    port: int
    path: str
    host: str = "127.0.0.1"

    def request(self, body: bytes) -> bytes:
        """The bytes of a POST of this JSON."""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nAuthorization: Bearer local\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + body


@dataclass
class Exchange:
    """One request and what came back, unread. Times are `time.monotonic()`.

    Args:
        due_s: when it was to be sent: in an open loop, a client that is late does not make the server look faster.
        arrivals: each piece as the socket gave it, and when.
        ended_s: when the server closed.
        failure: what went wrong with the connection, if something did.
    """

    due_s: float
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    ended_s: float = 0.0
    failure: str | None = None

    @property
    def refused(self) -> bool:
        """Whether there was no answer with status 200."""
        return not self.arrivals or b" 200 " not in self.arrivals[0][1][:16]


class _Connection(asyncio.Protocol):
    """Sends one request and writes down what comes."""

    def __init__(self, request: bytes, arrivals: list[tuple[float, bytes]]) -> None:
        self._request = request
        self._arrivals = arrivals
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asked with isinstance: uvloop's transports are of a family of their own.
        cast("asyncio.Transport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._arrivals.append((time.monotonic(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.closed.done():
            return
        if exc is None:
            self.closed.set_result(None)
        else:
            self.closed.set_exception(exc)


async def ask(address: Address, body: bytes, due_s: float | None = None, limit_s: float = LIMIT_S) -> Exchange:
    """Send one request and wait for its end; a failure stands in the result."""
    exchange = Exchange(time.monotonic() if due_s is None else due_s)
    request = address.request(body)
    try:
        async with asyncio.timeout(limit_s):
            transport, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(request, exchange.arrivals), address.host, address.port
            )
            try:
                await connection.closed
            finally:
                transport.abort()
    except TimeoutError:
        exchange.failure = f"no end within {limit_s:g} s"
    except OSError as error:
        exchange.failure = f"{type(error).__name__}: {error.strerror or error}"
    exchange.ended_s = time.monotonic()
    return exchange


async def closed_loop(address: Address, body: bytes, clients: int, seconds: float) -> list[Exchange]:
    """So many clients, each of which asks anew when its answer has ended, for so long.

    Each asks once at least, and the last answers are awaited.
    """
    exchanges: list[Exchange] = []

    async def client(ends_at: float) -> None:
        while True:
            exchange = await ask(address, body)
            exchanges.append(exchange)
            if time.monotonic() >= ends_at:
                return
            if exchange.refused:
                await asyncio.sleep(_AFTER_REFUSAL_S)

    with _no_collections():
        # The clock starts here: the collection before may have taken a while.
        ends_at = time.monotonic() + seconds
        await asyncio.gather(*(client(ends_at) for _ in range(clients)))
    return exchanges


async def open_loop(address: Address, body: bytes, arrivals: Sequence[float]) -> list[Exchange]:
    """One request at each of these times, in seconds from now; the last answers are awaited."""

    async def client(due_s: float) -> Exchange:
        await asyncio.sleep(due_s - time.monotonic())
        return await ask(address, body, due_s)

    with _no_collections():
        begun = time.monotonic()
        return await asyncio.gather(*(client(begun + at) for at in arrivals))


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without pauses for the collection of garbage, which would look like the server's."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
