"""The RunPod client over real connections: cancelled polls, refused deliveries, and what errors show."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import uvloop
from aiohttp import web

from engine.errors import DeliveryError, RefusedDeliveryError
from engine.queue.protocol import POLL_CANCEL_GRACE_S, PostKind
from engine.queue.runpod_client import RunPodClient, missing_interface, serve

pytestmark = pytest.mark.anyio
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def trust(client: RunPodClient, tls: Path) -> None:
    """Let its polls trust the certificate in this directory: aiohttp has read what it trusts when it was imported."""
    context = ssl.create_default_context(cafile=tls / "cert.pem")
    client._connections._take_connector._ssl = client._connections._stop_connector._ssl = context


@asynccontextmanager
async def client_of(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, tls: Path | None = None
) -> AsyncIterator[RunPodClient]:
    """Yield a client of a platform that answers every call so; `tls` is the directory of its certificate."""
    from runpod.serverless.modules import rp_job

    app = web.Application()
    app.router.add_route("*", "/{any:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    server_tls = None
    if tls is not None:
        monkeypatch.setenv("SSL_CERT_FILE", str(tls / "cert.pem"))
        server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server_tls.load_cert_chain(tls / "cert.pem", tls / "key.pem")
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_tls)
    await site.start()
    url = f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
    monkeypatch.setattr(rp_job, "JOB_GET_URL", f"{url}/job-take/worker?key=secret")
    try:
        async with RunPodClient() as client:
            client._urls = {kind: f"{url}/{kind.value}/$ID?key=secret" for kind in PostKind}
            if tls is not None:
                trust(client, tls)
            yield client
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(made, cwd=directory, check=True, capture_output=True)
    return directory


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    """Run the tests on uvloop, as the worker does."""
    return "asyncio", {"loop_factory": uvloop.new_event_loop}


async def test_an_error_page_that_is_not_utf8_is_quoted_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(status=502, body="<p>Störung</p>".encode("latin-1"), content_type="text/html")

    async with client_of(page, monkeypatch) as client:
        with pytest.raises(DeliveryError, match=r"status 502: <p>St.rung</p>"):
            await client.post(PostKind.RESULT, "1", b"{}")


async def test_a_refusal_has_the_status_and_a_short_message(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=413, text="漢" * 1000)

    async with client_of(refuse, monkeypatch) as client:
        with pytest.raises(RefusedDeliveryError) as refusal:
            await client.post(PostKind.OUTPUT, "1", b"{}")
    assert refusal.value.status == 413
    assert len(str(refusal.value)) < 100


async def test_a_failed_delivery_is_reported_without_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    async def around(request: web.Request) -> web.Response:
        raise web.HTTPFound(str(request.url))

    async with client_of(around, monkeypatch) as client:
        with pytest.raises(DeliveryError, match=r"Maximum .* redirects") as failure:
            await client.post(PostKind.RESULT, "1", b"{}")
    assert "secret" not in str(failure.value)


@pytest.fixture(params=["http", "https"])
def tls(request: pytest.FixtureRequest, certificate: Path) -> Path | None:
    return certificate if request.param == "https" else None


async def test_a_job_that_is_on_its_way_when_polling_stops_arrives(
    tls: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = asyncio.Event()

    async def give(request: web.Request) -> web.StreamResponse:
        answer = web.json_response({"id": "1", "input": {}})
        await answer.prepare(request)
        await answer.write_eof()
        sent.set()
        return answer

    async with client_of(give, monkeypatch, tls) as client:
        take = asyncio.create_task(client.take(1))
        await sent.wait()
        assert not take.done()
        client.stop_polling()

        assert await take == [{"id": "1", "input": {}}]


async def test_a_take_ends_as_soon_as_the_platform_notices_that_polling_stopped(
    tls: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def hold(_: web.Request) -> web.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with client_of(hold, monkeypatch, tls) as client:
        take = asyncio.create_task(client.take(1))
        await asked.wait()
        begun = time.monotonic()
        client.stop_polling()

        with pytest.raises(aiohttp.ClientConnectionError):
            await asyncio.wait_for(take, 10)
        assert time.monotonic() - begun < POLL_CANCEL_GRACE_S


async def test_new_connections_are_used_after_a_freeze_and_what_is_on_dead_ones_fails(
    tls: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server keeps silent on the first connections, as one does that has forgotten them."""
    transports: set[asyncio.Transport | None] = set()
    asked = asyncio.Semaphore(0)
    silent = True

    async def answer(request: web.Request) -> web.Response:
        if silent:
            transports.add(request.transport)
            asked.release()
            await asyncio.Event().wait()
        assert request.transport not in transports
        return web.json_response({"id": "1", "input": {}, "jobsToStop": ["2"]})

    async with client_of(answer, monkeypatch, tls) as client:
        dead = [
            asyncio.create_task(client.take(1)),
            asyncio.create_task(client.stop_signals()),
            asyncio.create_task(client.post(PostKind.OUTPUT, "1", b"{}")),
        ]
        for _ in dead:
            await asked.acquire()
        silent = False
        begun = time.monotonic()
        client.reconnect()
        if tls is not None:
            trust(client, tls)

        assert await client.take(1) == [{"id": "1", "input": {}, "jobsToStop": ["2"]}]
        assert await client.stop_signals() == ["2"]
        await client.post(PostKind.OUTPUT, "1", b"{}")
        assert not dead[2].done()
        errors = await asyncio.wait_for(asyncio.gather(*dead, return_exceptions=True), POLL_CANCEL_GRACE_S + 5)

    assert time.monotonic() - begun >= POLL_CANCEL_GRACE_S
    assert [isinstance(error, aiohttp.ClientError) for error in errors] == [True, True, False]
    assert isinstance(errors[2], DeliveryError)


async def test_what_is_on_its_way_after_a_freeze_arrives(tls: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = asyncio.Semaphore(0)

    async def give(request: web.Request) -> web.StreamResponse:
        answer = web.json_response({"id": "1", "input": {}, "jobsToStop": ["2"]})
        await answer.prepare(request)
        await answer.write_eof()
        sent.release()
        return answer

    async with client_of(give, monkeypatch, tls) as client:
        polls = [
            asyncio.create_task(client.take(1)),
            asyncio.create_task(client.stop_signals()),
            asyncio.create_task(client.post(PostKind.OUTPUT, "1", b"{}")),
        ]
        for _ in polls:
            await sent.acquire()
        client.reconnect()

        assert await asyncio.gather(*polls) == [[{"id": "1", "input": {}, "jobsToStop": ["2"]}], ["2"], None]


def test_the_installed_sdk_has_the_interface_that_the_job_loop_needs() -> None:
    assert missing_interface() is None


async def more_arguments(session: object, count: int, region: str) -> None:
    del session, count, region


@pytest.mark.parametrize(
    ("name", "replacement", "expected_message"),
    [
        ("rp_job.get_stop_signals", None, "get_stop_signals"),
        ("rp_job.get_job", more_arguments, "region"),
        ("rp_job.get_stop_signals", list, "coroutines"),
        ("worker_state.JobsProgress.remove", None, "remove"),
        ("rp_scale.JobScaler", None, "JobScaler"),
    ],
)
def test_a_missing_or_different_part_of_the_sdk_is_named(
    name: str, replacement: object, expected_message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"runpod.serverless.modules.{name}"
    if replacement is None:
        monkeypatch.delattr(path)
    else:
        monkeypatch.setattr(path, replacement)

    assert expected_message in str(missing_interface())


def test_another_version_of_the_sdk_with_the_same_interface_runs_our_job_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    import runpod
    from runpod.serverless.modules import rp_scale

    stock = rp_scale.JobScaler
    started: list[type] = []
    monkeypatch.setattr(rp_scale, "JobScaler", stock)
    monkeypatch.setattr(runpod, "__version__", "9.0.0")
    monkeypatch.setattr(runpod.serverless, "start", lambda _: started.append(rp_scale.JobScaler))

    serve(lambda _: None, lambda _: asyncio.sleep(0, 0), 1, lambda: None)

    assert started != [stock]
    assert len(started) == 1
