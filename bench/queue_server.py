"""The platform's queue as a load generator: over TLS, some distance away, and with as little CPU as possible.

It speaks the worker's side of the protocol only (runpod 1.12.0: `rp_job`, `rp_http`, `rp_ping`) and plays the clients
itself, so that what is measured is the worker. `emulator` is the complete platform.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Self, cast

from bench.clients import Address, RequestTrace, gc_paused
from emulator.certificate import Certificate
from emulator.core.process import worker_environment

_HOST, _ENDPOINT, _WORKER, _KEY = "127.0.0.1", "bench", "worker", "local"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_BATCH_SIZE = re.compile(r"batch_size=(\d+)")
_LONG_POLL_S = 30.0
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


class QueueServer:
    """A queue whose jobs are made as a closed loop of clients: `async with QueueServer() as queue`.

    Attributes:
        latency_s: round-trip time between the worker and the platform, in addition to the loopback's.
        posts: number of outputs received so far, without the results.
        polled: set once a worker has asked for jobs.
    """

    def __init__(self) -> None:
        self.latency_s = 0.0
        self.posts = 0
        self._certificate = Certificate([_HOST], os.environ)
        self._queued: deque[str] = deque()
        self._polls: list[_Poll] = []
        self._traces: dict[str, RequestTrace] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._input: Any = None
        self._number = 0
        self.polled = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Accept connections."""
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self), _HOST, 0, ssl=self._certificate.context
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the server, and delete its certificate."""
        self._server.close()
        self._certificate.remove()

    @property
    def address(self) -> Address:
        """Where workers reach it."""
        return Address(self._server.sockets[0].getsockname()[1], f"/v2/{_ENDPOINT}", _HOST)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a worker finds this queue and trusts it."""
        url = f"https://{_HOST}:{self.address.port}"
        return worker_environment(url, _ENDPOINT, _WORKER, _KEY, 10_000) | self._certificate.environment

    async def closed_loop(self, job_input: Any, clients: int, seconds: float) -> list[RequestTrace]:
        """Keep this many jobs queued or running for some seconds; return what arrived, as a client would read it."""
        self._input = job_input
        with gc_paused():
            ends_at = time.monotonic() + seconds
            traces = await asyncio.gather(*(self._client(ends_at) for _ in range(clients)))
        return [_as_response(trace) for client in traces for trace in client]

    async def _client(self, ends_at: float) -> list[RequestTrace]:
        traces: list[RequestTrace] = []
        while not traces or time.monotonic() < ends_at:
            self._number += 1
            job_id = f"job-{self._number}"
            self._traces[job_id] = trace = RequestTrace(time.monotonic())
            self._ended[job_id] = ended = asyncio.Event()
            self._queued.append(job_id)
            self._answer_polls()
            await ended.wait()
            traces.append(trace)
            del self._traces[job_id], self._ended[job_id]
        return traces

    def on_request(self, connection: _Connection, method_and_path: str, body: bytes) -> None:
        """Handle a request of the worker."""
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        call = method_and_path.split("/")[3]
        if call.startswith("job-take"):
            self.polled.set()
            size = _BATCH_SIZE.search(method_and_path)
            poll = _Poll(connection, int(size[1]) if size else 1)
            self._polls.append(poll)
            loop.call_later(_LONG_POLL_S, self._end_poll, poll)
            loop.call_later(self.latency_s / 2, self._answer_polls)
            return
        if call == "job-stop":
            loop.call_later(_LONG_POLL_S, connection.respond, _NOTHING)
            return
        if call in ("job-stream", "job-done"):
            job_id = method_and_path.split("/")[5].partition("?")[0]
            if (trace := self._traces.get(job_id)) is not None:
                trace.received.append((now + self.latency_s / 2, body))
                self.posts += call == "job-stream"
                if call == "job-done":
                    trace.ended_s = now + self.latency_s / 2
                    self._ended[job_id].set()
        if self.latency_s:
            loop.call_later(self.latency_s, connection.respond, _OK)
        else:
            connection.respond(_OK)

    def on_lost(self, connection: _Connection) -> None:
        """Forget the poll of a connection that is closed: a job would be lost with it."""
        self._polls = [poll for poll in self._polls if poll.connection is not connection]

    def _answer_polls(self) -> None:
        while self._queued and self._polls:
            poll = self._polls.pop(0)
            taken = [self._queued.popleft() for _ in range(min(poll.size, len(self._queued)))]
            jobs = json.dumps([{"id": job_id, "input": self._input} for job_id in taken]).encode()
            asyncio.get_running_loop().call_later(self.latency_s / 2, poll.connection.respond, _response(jobs))

    def _end_poll(self, poll: _Poll) -> None:
        if poll in self._polls:
            self._polls.remove(poll)
            poll.connection.respond(_NOTHING)


@dataclass(eq=False)
class _Poll:
    """A take that waits for jobs, at most `size`."""

    connection: _Connection
    size: int


class _Connection(asyncio.Protocol):
    """A kept-alive connection of the worker."""

    def __init__(self, queue: QueueServer) -> None:
        self._queue = queue
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast and no isinstance: uvloop's transports do not inherit from asyncio.Transport.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._pending += data
        while (end := self._pending.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._pending, 0, end)
            start = end + 4
            stop = start + (int(length[1]) if length else 0)
            if len(self._pending) < stop:
                return
            line = self._pending[: self._pending.index(b"\r\n")].decode()
            body, self._pending = self._pending[start:stop], self._pending[stop:]
            self._queue.on_request(self, line, body)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._queue.on_lost(self)

    def respond(self, response: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(response)


def _response(body: bytes, status: int = 200) -> bytes:
    head = f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


_OK, _NOTHING = _response(b"{}"), _response(b"", 204)


def _as_response(trace: RequestTrace) -> RequestTrace:
    """Turn what the worker has posted for a job into the response that a client of the platform would read."""
    *outputs, (_, result) = trace.received
    document = json.loads(result)
    if "error" in document:
        trace.error = str(document["error"])
    trace.received = [(at, json.loads(body)["output"].encode()) for at, body in outputs]
    if trace.received:
        trace.received[0] = (trace.received[0][0], _STREAM_HEAD + trace.received[0][1])
    return trace
