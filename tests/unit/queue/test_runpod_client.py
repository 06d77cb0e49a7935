"""The platform's protocol over real connections on this machine: what is let go, what is refused, what is told."""

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


@asynccontextmanager
async def platform_at(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, tls: Path | None = None
) -> AsyncIterator[RunPodClient]:
    """A platform whose every call gets this answer; `tls` is where its certificate is."""
    from runpod.serverless.modules import rp_job

    app = web.Application()
    app.router.add_route("*", "/{any:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    served = client = None
    if tls is not None:
        served, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=tls / "cert.pem")
        served.load_cert_chain(tls / "cert.pem", tls / "key.pem")
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=served)
    await site.start()
    url = f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
    monkeypatch.setattr(rp_job, "JOB_GET_URL", f"{url}/job-take/worker?key=secret")
    try:
        async with RunPodClient() as platform:
            platform._urls = {kind: f"{url}/{kind.value}/$ID?key=secret" for kind in PostKind}
            if client is not None:
                platform._connector._ssl = client
            yield platform
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
    """As the worker runs."""
    return "asyncio", {"loop_factory": uvloop.new_event_loop}


async def test_a_gateways_page_in_another_encoding_is_an_answer_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(status=502, body="<p>Störung</p>".encode("latin-1"), content_type="text/html")

    async with platform_at(page, monkeypatch) as platform:
        with pytest.raises(DeliveryError, match=r"status 502: <p>St.rung</p>"):
            await platform.post(PostKind.RESULT, "1", b"{}")


async def test_a_refusal_says_its_status_and_no_more_of_its_page_than_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=413, text="漢" * 1000)

    async with platform_at(refuse, monkeypatch) as platform:
        with pytest.raises(RefusedDeliveryError) as refusal:
            await platform.post(PostKind.OUTPUT, "1", b"{}")
    assert refusal.value.status == 413
    assert len(str(refusal.value)) < 100


async def test_a_delivery_that_fails_is_told_without_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    async def around(request: web.Request) -> web.Response:
        raise web.HTTPFound(str(request.url))

    async with platform_at(around, monkeypatch) as platform:
        with pytest.raises(DeliveryError, match="TooManyRedirects") as failure:
            await platform.post(PostKind.RESULT, "1", b"{}")
    assert "secret" not in str(failure.value)


@pytest.fixture(params=["http", "https"])
def tls(request: pytest.FixtureRequest, certificate: Path) -> Path | None:
    return certificate if request.param == "https" else None


async def test_a_job_that_is_on_its_way_as_its_take_is_let_go_arrives(
    tls: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = asyncio.Event()

    async def give(request: web.Request) -> web.StreamResponse:
        answer = web.json_response({"id": "1", "input": {}})
        await answer.prepare(request)
        await answer.write_eof()
        sent.set()
        return answer

    async with platform_at(give, monkeypatch, tls) as platform:
        take = asyncio.create_task(platform.take(1))
        await sent.wait()
        assert not take.done()
        platform.stop_polling()

        assert await take == [{"id": "1", "input": {}}]


async def test_a_take_that_is_let_go_ends_as_soon_as_the_platform_sees_that_nobody_asks(
    tls: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def hold(_: web.Request) -> web.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with platform_at(hold, monkeypatch, tls) as platform:
        take = asyncio.create_task(platform.take(1))
        await asked.wait()
        begun = time.monotonic()
        platform.stop_polling()

        with pytest.raises(aiohttp.ClientConnectionError):
            await asyncio.wait_for(take, 10)
        assert time.monotonic() - begun < POLL_CANCEL_GRACE_S


def test_the_sdk_that_is_installed_has_what_our_loop_needs() -> None:
    assert missing_interface() is None


def take_apart(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    from runpod.serverless.modules import rp_job, rp_scale, worker_state

    if change == "a call is gone":
        monkeypatch.delattr(rp_job, "get_stop_signals")
    elif change == "a call wants more":
        monkeypatch.setattr(rp_job, "get_job", more_arguments)
    elif change == "a call is no coroutine":
        monkeypatch.setattr(rp_job, "get_stop_signals", list)
    elif change == "the record of jobs has other methods":
        monkeypatch.delattr(worker_state.JobsProgress, "remove")
    else:
        monkeypatch.delattr(rp_scale, "JobScaler")


async def more_arguments(session: object, count: int, region: str) -> None:
    del session, count, region


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("a call is gone", "get_stop_signals"),
        ("a call wants more", "region"),
        ("a call is no coroutine", "coroutines"),
        ("the record of jobs has other methods", "remove"),
        ("the loop has another name", "JobScaler"),
    ],
)
def test_what_an_sdk_lacks_is_told(change: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_apart(monkeypatch, change)

    assert told in str(missing_interface())


def test_an_sdk_of_another_version_with_the_same_interface_keeps_our_loop(monkeypatch: pytest.MonkeyPatch) -> None:
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
