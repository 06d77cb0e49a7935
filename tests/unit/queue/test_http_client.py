"""The HTTP client of deliveries, over real connections."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import certifi
import pytest
import uvloop
from aiohttp import web

from emulator.certificate import Certificate
from emulator.free_port import free_port
from engine.queue.http_client import HTTPClient

pytestmark = pytest.mark.anyio
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
HEADERS = {"Authorization": "Bearer secret", "Content-Type": "application/json"}


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    """Run the tests on uvloop, as the worker does."""
    return "asyncio", {"loop_factory": uvloop.new_event_loop}


@asynccontextmanager
async def server(answer: Answer, tls: Certificate | None = None, **options: Any) -> AsyncIterator[str]:
    """Run a server that answers each request so; yield its URL."""
    app = web.Application(client_max_size=10**9)
    app.router.add_route("*", "/{any:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, **options)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls.context if tls else None).start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client(timeout_s: float = 20.0) -> AsyncIterator[HTTPClient]:
    result = HTTPClient(HEADERS, timeout_s)
    try:
        yield result
    finally:
        result.close()


def add_to_directory(ca_file: Path, directory: Path) -> None:
    """Add a CA to a directory of certificates, as OpenSSL looks for it."""
    command = ["openssl", "x509", "-hash", "-noout", "-in", str(ca_file)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    (directory / f"{name}.0").write_bytes(ca_file.read_bytes())


async def test_a_request_arrives_as_it_was_given() -> None:
    """Headers of a request replace those of the client; a path, a query and text outside ASCII arrive unchanged."""
    seen: list[Any] = []

    async def echo(request: web.Request) -> web.Response:
        seen.append((request.method, request.path_qs, dict(request.headers)))
        return web.Response(body=await request.read(), status=201)

    async with server(echo) as url, client() as posts:
        response = await posts.post(
            f"{url}/done/1?a=b%20c", {"Content-Type": "text/plain", "X-Request-ID": "é"}, b"\0x"
        )
    assert response == (201, b"\0x")
    ((method, path, received),) = seen
    assert (method, path) == ("POST", "/done/1?a=b%20c")
    assert received["Content-Type"] == "text/plain"
    assert received["X-Request-ID"] == "é"
    assert received["Authorization"] == "Bearer secret"


async def test_a_large_body_is_sent_without_asking_for_consent() -> None:
    """Libcurl would send `Expect: 100-continue`, and wait a second for a server that does not answer it."""
    expected: list[str | None] = []

    async def length(request: web.Request) -> web.Response:
        expected.append(request.headers.get("Expect"))
        return web.Response(text=str(len(await request.read())))

    async with server(length) as url, client() as posts:
        response = await posts.post(url, {}, bytes(20_000_000))
    assert response.body == b"20000000"
    assert expected == [None]


async def test_connections_are_used_again_and_each_carries_one_request_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connections: set[object] = set()

    async def slow(request: web.Request) -> web.Response:
        connections.add(request.transport)
        await asyncio.sleep(0.05)
        return web.Response()

    certificate = Certificate(["127.0.0.1"], os.environ)
    monkeypatch.setenv("SSL_CERT_FILE", certificate.environment["SSL_CERT_FILE"])
    async with server(slow, certificate) as url, client() as posts:
        for _ in range(3):
            responses = await asyncio.gather(*(posts.post(url, {}, b"{}") for _ in range(20)))
            assert [response.status for response in responses] == [200] * 20
    certificate.remove()
    assert len(connections) == 20


async def test_a_connection_that_the_server_has_closed_meanwhile_is_not_used_again() -> None:
    """A platform closes idle connections: the next request must not fail for it."""

    async def hello(_: web.Request) -> web.Response:
        return web.Response()

    async with server(hello, keepalive_timeout=0.05) as url, client() as posts:
        for _ in range(3):
            assert (await posts.post(url, {}, b"{}")).status == 200
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("after", ["nothing", "half"])
async def test_a_connection_that_is_lost_is_an_error(after: str) -> None:
    async def lose(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        if after == "half":
            await response.prepare(request)
            await response.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return response

    async with server(lose) as url, client() as posts:
        with pytest.raises(ConnectionError):
            await posts.post(url, {}, b"{}")


async def test_a_server_that_is_not_there_is_an_error() -> None:
    async with client() as posts:
        with pytest.raises(ConnectionError, match="connect"):
            await posts.post(f"http://127.0.0.1:{free_port()}", {}, b"{}")


async def test_a_request_that_takes_too_long_is_an_error() -> None:
    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    async with server(never) as url, client(timeout_s=0.2) as posts:
        with pytest.raises(ConnectionError, match=r"[Tt]ime"):
            await posts.post(url, {}, b"{}")


async def test_an_unknown_certificate_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what Python trusts is trusted: the key in the headers must not reach another server."""
    requests: list[web.Request] = []

    async def hello(request: web.Request) -> web.Response:
        requests.append(request)
        return web.Response()

    certificate, other = Certificate(["127.0.0.1"], os.environ), Certificate(["127.0.0.1"], os.environ)
    for trusted in (None, other.environment["SSL_CERT_FILE"]):
        if trusted is None:
            monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        else:
            monkeypatch.setenv("SSL_CERT_FILE", trusted)
        async with server(hello, certificate) as url, client() as posts:
            with pytest.raises(ConnectionError, match=r"(?i)certificate"):
                await posts.post(url, {}, b"{}")
    for each in (certificate, other):
        each.remove()
    assert not requests


async def test_a_redirect_keeps_method_and_body_but_no_key_for_another_server() -> None:
    seen: list[tuple[str, bytes, str | None]] = []

    async def accept(request: web.Request) -> web.Response:
        seen.append((request.method, await request.read(), request.headers.get("Authorization")))
        return web.Response(text="accepted")

    async with server(accept) as target, client() as posts:
        for status in (301, 302, 307, 308):

            async def redirect(_: web.Request, status: int = status) -> web.Response:
                return web.Response(status=status, headers={"Location": f"{target}/there"})

            async with server(redirect) as url:
                assert (await posts.post(url, {}, b"body")).body == b"accepted"
    assert seen == [("POST", b"body", None)] * 4


async def test_no_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the SDK's own calls, which come from another client."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    async def hello(_: web.Request) -> web.Response:
        return web.Response()

    async with server(hello) as url, client() as posts:
        assert (await posts.post(url, {}, b"{}")).status == 200


async def test_a_cancelled_request_ends_and_later_ones_are_served() -> None:
    """Its answer, should it still come, must not be taken for that of another request."""
    release = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        if body == b"first":
            await release.wait()
        return web.Response(body=body)

    async with server(answer) as url, client() as posts:
        first = asyncio.create_task(posts.post(url, {}, b"first"))
        await asyncio.sleep(0.1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        release.set()
        bodies = [f"{number}".encode() for number in range(10)]
        responses = await asyncio.gather(*(posts.post(url, {}, body) for body in bodies))
        assert [response.body for response in responses] == bodies


async def test_a_body_is_not_kept_after_its_request() -> None:
    """Results may have 20 MB each, and there are as many idle transfers as there once were jobs at a time."""

    async def hello(request: web.Request) -> web.Response:
        await request.read()
        return web.Response()

    body = bytes(100_000)
    references = sys.getrefcount(body)
    async with server(hello) as url, client() as posts:
        await posts.post(url, {}, body)
        assert sys.getrefcount(body) == references


async def test_a_certificate_in_the_directory_of_the_user_is_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As by aiohttp, which takes the jobs: their results must not fail for it."""

    async def hello(_: web.Request) -> web.Response:
        return web.Response()

    certificate = Certificate(["127.0.0.1"], os.environ)
    add_to_directory(certificate.ca_file, tmp_path)
    for file in (None, certifi.where()):
        monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
        if file is None:
            monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        else:
            monkeypatch.setenv("SSL_CERT_FILE", file)
        async with server(hello, certificate) as url, client() as posts:
            assert (await posts.post(url, {}, b"{}")).status == 200
    certificate.remove()


async def test_a_request_after_closing_is_an_error() -> None:
    posts = HTTPClient(HEADERS, 20.0)
    posts.close()
    with pytest.raises(ConnectionError, match="closed"):
        await posts.post("http://127.0.0.1:9", {}, b"{}")


async def test_closing_fails_the_requests_in_progress() -> None:
    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    async with server(never) as url:
        posts = HTTPClient(HEADERS, 20.0)
        waiting = asyncio.create_task(posts.post(url, {}, b"{}"))
        await asyncio.sleep(0.1)
        started_s = time.monotonic()
        posts.close()
        with pytest.raises(ConnectionError, match="closed"):
            await waiting
        assert time.monotonic() - started_s < 10
