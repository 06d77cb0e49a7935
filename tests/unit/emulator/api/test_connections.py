"""Connections over plain HTTP and over TLS: reused, dropped, and half-closed by the client."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from urllib.parse import urlsplit

import httpx
import pytest

from emulator.core.job_queue import JOBS_QUEUED_TOPIC
from tests.unit.emulator.conftest import KEY, Site, emulator_with, wait_until
from tests.unit.emulator.fakes import submission


@pytest.fixture(scope="module", params=[False, True], ids=["http", "https"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with ExitStack() as stack:
        emulator = stack.enter_context(emulator_with({"id": "ep", "longPoll": 20}, tls=request.param))
        yield Site(emulator, stack)


def test_connections_are_reused(site: Site) -> None:
    streams = {site.client.get("/health").extensions["network_stream"].get_extra_info("client_addr") for _ in range(3)}
    assert len(streams) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_drop_fault_closes_the_connection_without_a_response(site: Site, when: str) -> None:
    rule = {"kind": "drop", "route": "job-take", "when": when, "times": 1}
    site.root.put("/faults", json={"rules": [rule]}).raise_for_status()
    job_id = site.submit()
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        site.worker.get("/job-take/w1?gpu=x")
    if when == "after":
        assert site.done(job_id).status_code == 200
    else:
        assert site.take("w2")["id"] == job_id
        site.done(job_id, "w2")


class Poll:
    """A long poll of a worker, over a connection that the worker can half-close."""

    def __init__(self, site: Site, path: str) -> None:
        url = urlsplit(site.url)
        self.tcp = socket.create_connection((url.hostname, url.port), timeout=10)
        # Shutting this down bypasses TLS: no close_notify is sent, and data from the server can still be read.
        self.raw = self.tcp.dup()
        self.stream = site.tls.wrap_socket(self.tcp, server_hostname=url.hostname) if site.tls else self.tcp
        waiters = site.endpoint.long_poll._waiters
        count = sum(map(len, waiters.values()))
        request = f"GET /v2/ep{path} HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\n\r\n"
        self.stream.sendall(request.encode())
        wait_until(lambda: sum(map(len, list(waiters.values()))) == count + 1)

    def half_close(self) -> None:
        self.raw.shutdown(socket.SHUT_WR)

    def read_response(self) -> bytes:
        """Read until the server closes the connection."""
        response = b""
        try:
            while received := self.stream.recv(65536):
                response += received
        except ssl.SSLEOFError:
            pass  # The server sent no close_notify.
        return response

    def close(self) -> None:
        self.stream.close()
        self.raw.close()


def test_a_half_closed_poll_ends_at_once_and_takes_no_job(site: Site) -> None:
    with closing(Poll(site, "/job-take/closing?gpu=x")) as poll:
        before = time.monotonic()
        poll.half_close()
        assert poll.read_response() == b""
        assert time.monotonic() - before < 1
    job_id = site.submit()
    assert site.status(job_id)["status"] == "IN_QUEUE"
    assert site.take("w2")["id"] == job_id
    site.done(job_id, "w2")


def test_a_job_queued_just_as_the_poll_is_half_closed_is_not_taken(site: Site) -> None:
    """The event loop reads the end of file one iteration before the waiting take polls for a job."""
    endpoint = site.endpoint
    with closing(Poll(site, "/job-take/closing?gpu=x")) as poll:
        jobs: list[str] = []

        def submit() -> None:
            poll.half_close()
            jobs.append(endpoint.queue.submit(submission(), retention_s=60).id)

        (waiter,) = endpoint.long_poll._waiters[JOBS_QUEUED_TOPIC]
        waiter.get_loop().call_soon_threadsafe(submit)
        response = poll.read_response()
    jobs_taken = next(worker for worker in endpoint.fleet.workers() if worker.id == "closing").jobs_taken
    assert (response, site.status(jobs[0])["status"], jobs_taken) == (b"", "IN_QUEUE", 0)
    assert site.take("w2")["id"] == jobs[0]
    site.done(jobs[0], "w2")
