"""The emulator over TLS: who trusts it, what becomes of its key, and connections that end as over plain HTTP."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import certifi
import httpx
import pytest

from emulator.certificate import LOOPBACK, Certificate
from emulator.core.job_queue import JOBS_QUEUED_TOPIC
from tests.unit.emulator.conftest import KEY, Site, emulator_with, until
from tests.unit.emulator.fakes import submission

# What a worker and its libraries call with: the SDK's two clients, and those of the hub and of vLLM.
_CLIENTS = """
import asyncio, ssl, sys, aiohttp, httpx, httpx2, requests
async def asynchronous():
    async with aiohttp.ClientSession() as session, session.get(sys.argv[1]) as answer:
        return answer.status
print(asyncio.run(asynchronous()), *(one.get(sys.argv[1]).status_code for one in (httpx, httpx2, requests)))
print(len(ssl.create_default_context().get_ca_certs()))
"""


@pytest.fixture(scope="module", params=[False, True], ids=["http", "https"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with ExitStack() as stack:
        emulator = stack.enter_context(emulator_with({"id": "ep", "longPoll": 20}, tls=request.param))
        yield Site(emulator, stack)


@pytest.fixture
def certificate() -> Iterator[Certificate]:
    made = Certificate(["192.0.2.7", "box.example"], {})
    yield made
    made.remove()


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """Let two sides agree in memory.

    Raises:
        ssl.SSLError: they do not.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname=host),
    ]
    for side in (*reversed(sides), *sides, *reversed(sides)):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


@pytest.mark.parametrize("host", [*LOOPBACK, "192.0.2.7", "box.example"])
def test_the_certificate_is_valid_for_the_loopback_and_for_the_host_by_the_strictest_rules(
    certificate: Certificate, host: str
) -> None:
    client = ssl.create_default_context(cafile=certificate.ca_file)
    # As Python 3.13 does by default.
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    handshake(certificate.context, client, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(certificate.context, client, "other.example")


def test_nobody_who_trusts_one_emulator_trusts_another(certificate: Certificate) -> None:
    other = Certificate([], {})
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(certificate.context, ssl.create_default_context(cafile=other.ca_file), "localhost")
    other.remove()


def test_the_key_is_its_owners_alone_and_gone_once_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    load = ssl.SSLContext.load_cert_chain

    def look(context: ssl.SSLContext, chain: Path, key: Path) -> None:
        modes.extend(stat.S_IMODE(path.stat().st_mode) for path in (key, key.parent))
        load(context, chain, key)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", look)
    made = Certificate([], {})
    directory = made.ca_file.parent
    assert modes == [0o600, 0o700]
    assert [path.name for path in directory.iterdir() if b"PRIVATE KEY" in path.read_bytes()] == []
    made.remove()
    assert not directory.exists()


def test_a_bundle_has_the_cas_that_were_trusted_before_and_the_emulators(tmp_path: Path) -> None:
    proxy = tmp_path / "proxy.pem"
    proxy.write_text("a company's CA")
    made = Certificate([], {"CURL_CA_BUNDLE": str(proxy)})
    ours = made.ca_file.read_text()
    bundles = {name: Path(path).read_text() for name, path in made.environment.items()}
    made.remove()
    assert bundles == {
        "SSL_CERT_FILE": f"{Path(certifi.where()).read_text()}\n{ours}",
        "REQUESTS_CA_BUNDLE": f"a company's CA\n{ours}",
    }


def test_each_client_of_a_worker_trusts_the_emulator_and_the_public_cas() -> None:
    with emulator_with({"id": "ep"}, tls=True) as emulator:
        assert emulator._certificate is not None
        variables = {**os.environ, **emulator._certificate.environment}
        ran = subprocess.run(
            [sys.executable, "-c", _CLIENTS, emulator.url], env=variables, capture_output=True, text=True, check=False
        )
    statuses, count = ran.stdout.splitlines() or [ran.stderr, "0"]
    assert statuses == "200 200 200 200"
    assert int(count) > 100


def test_the_files_last_as_long_as_the_emulator() -> None:
    with emulator_with({"id": "ep"}, tls=True) as emulator:
        assert emulator.url.startswith("https://127.0.0.1:")
        assert emulator.ca_file is not None
        assert emulator.ca_file.exists()
    assert not emulator.ca_file.parent.exists()


def test_it_ends_without_waiting_for_a_client_that_sits_idle(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack, emulator_with({"id": "ep"}, tls=True) as emulator:
        Site(emulator, stack).client.get("/health").raise_for_status()
    assert "timeout graceful shutdown exceeded" not in caplog.text


def test_connections_are_kept(site: Site) -> None:
    streams = {site.client.get("/health").extensions["network_stream"].get_extra_info("client_addr") for _ in range(3)}
    assert len(streams) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_is_dropped_with_nothing_said(site: Site, when: str) -> None:
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
    """A take that is held, over a connection that can be closed from its own side alone, as a worker does."""

    def __init__(self, site: Site, path: str) -> None:
        url = urlsplit(site.url)
        self.tcp = socket.create_connection((url.hostname, url.port), timeout=10)
        # Closing it below TLS: no close_notify is sent, and the other side is still heard.
        self.below = self.tcp.dup()
        self.stream = site.tls.wrap_socket(self.tcp, server_hostname=url.hostname) if site.tls else self.tcp
        waiters = site.emulator.endpoints["ep"].long_poll._waiters
        count = sum(map(len, waiters.values()))
        request = f"GET /v2/ep{path} HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\n\r\n"
        self.stream.sendall(request.encode())
        until(lambda: sum(map(len, list(waiters.values()))) == count + 1)

    def half_close(self) -> None:
        self.below.shutdown(socket.SHUT_WR)

    def answer(self) -> bytes:
        """All that comes until the other side closes too."""
        answer = b""
        try:
            while received := self.stream.recv(65536):
                answer += received
        except ssl.SSLEOFError:
            pass  # It has not said goodbye either.
        return answer

    def close(self) -> None:
        self.stream.close()
        self.below.close()


def test_a_worker_that_has_closed_its_side_is_answered_at_once_and_given_no_job(site: Site) -> None:
    with closing(Poll(site, "/job-take/leaving?gpu=x")) as poll:
        before = time.monotonic()
        poll.half_close()
        assert poll.answer() == b""
        assert time.monotonic() - before < 1
    job_id = site.submit()
    assert site.status(job_id)["status"] == "IN_QUEUE"
    assert site.take("w2")["id"] == job_id
    site.done(job_id, "w2")


def test_a_job_that_comes_with_the_end_of_its_connection_is_given_to_nobody(site: Site) -> None:
    """The loop reads the end of the file one turn before the waiting take looks for a job."""
    endpoint = site.emulator.endpoints["ep"]
    with closing(Poll(site, "/job-take/leaving?gpu=x")) as poll:
        jobs: list[str] = []

        def submit() -> None:
            poll.half_close()
            jobs.append(endpoint.queue.submit(submission(), retention_s=60).id)

        (waiter,) = endpoint.long_poll._waiters[JOBS_QUEUED_TOPIC]
        waiter.get_loop().call_soon_threadsafe(submit)
        answer = poll.answer()
    given = next(worker for worker in endpoint.fleet.workers() if worker.id == "leaving").jobs_taken
    assert (answer, site.status(jobs[0])["status"], given) == (b"", "IN_QUEUE", 0)
    assert site.take("w2")["id"] == jobs[0]
    site.done(jobs[0], "w2")
