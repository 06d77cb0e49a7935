"""Load clients that use very little CPU: they record what arrives and when, and parse it only after the load.

Clients share the processor with the systems that they measure. Each request opens its own connection and the server
closes it at the end (`Connection: close`), so the client can see the end of a response without parsing it.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

# A request that takes longer is cancelled and counts as an error.
REQUEST_TIMEOUT_S = 300.0
# Without this delay, a client would retry thousands of times a second against a server that rejects immediately.
_RETRY_DELAY_S = 0.1


@dataclass(frozen=True)
class Address:
    """Where a system serves chat completions: a port on this machine and the path of the route."""

    port: int
    path: str
    host: str = "127.0.0.1"

    def request(self, body: bytes) -> bytes:
        """Return the bytes of a POST request with this JSON body."""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nAuthorization: Bearer local\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + body


@dataclass
class RequestTrace:
    """One request and the unparsed response. Times are `time.monotonic()`.

    Args:
        due_s: when the request was scheduled; with an open loop, a client that sends late does not make the system
            look faster.
        received: each read from the socket: when, and the bytes.
        ended_s: when the connection closed.
        error: the connection error or timeout, if there was one.
    """

    due_s: float
    received: list[tuple[float, bytes]] = field(default_factory=list)
    ended_s: float = 0.0
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the response has status 200."""
        return bool(self.received) and b" 200 " in self.received[0][1][:16]


class _Connection(asyncio.Protocol):
    """Sends one request and records what arrives."""

    def __init__(self, request: bytes, received: list[tuple[float, bytes]]) -> None:
        self._request = request
        self._received = received
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast and no isinstance: uvloop's transports do not inherit from asyncio.Transport.
        cast("asyncio.Transport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received.append((time.monotonic(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.closed.done():
            return
        if exc is None:
            self.closed.set_result(None)
        else:
            self.closed.set_exception(exc)


async def send(
    address: Address, body: bytes, due_s: float | None = None, timeout_s: float = REQUEST_TIMEOUT_S
) -> RequestTrace:
    """Send one request and wait for the end of the response; errors are recorded in the trace."""
    trace = RequestTrace(time.monotonic() if due_s is None else due_s)
    request = address.request(body)
    try:
        async with asyncio.timeout(timeout_s):
            transport, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(request, trace.received), address.host, address.port
            )
            try:
                await connection.closed
            finally:
                transport.abort()
    except TimeoutError:
        trace.error = f"timed out after {timeout_s:g} s"
    except OSError as error:
        trace.error = f"{type(error).__name__}: {error.strerror or error}"
    trace.ended_s = time.monotonic()
    return trace


async def closed_loop(address: Address, body: bytes, clients: int, seconds: float) -> list[RequestTrace]:
    """Run N clients for some seconds; each sends its next request as soon as its last response has ended.

    Each client sends at least one request, and the last responses are awaited.
    """
    traces: list[RequestTrace] = []

    async def client(ends_at: float) -> None:
        while True:
            trace = await send(address, body)
            traces.append(trace)
            if time.monotonic() >= ends_at:
                return
            if not trace.ok:
                await asyncio.sleep(_RETRY_DELAY_S)

    with gc_paused():
        # The clock starts here because the garbage collection above may have taken some time.
        ends_at = time.monotonic() + seconds
        await asyncio.gather(*(client(ends_at) for _ in range(clients)))
    return traces


async def open_loop(address: Address, body: bytes, arrivals_s: Sequence[float]) -> list[RequestTrace]:
    """Send one request at each of these times, in seconds from now; the last responses are awaited."""

    async def client(due_s: float) -> RequestTrace:
        await asyncio.sleep(due_s - time.monotonic())
        return await send(address, body, due_s)

    with gc_paused():
        start = time.monotonic()
        return await asyncio.gather(*(client(start + arrival_s) for arrival_s in arrivals_s))


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable garbage collection, whose pauses would look like latency of the system under test."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
