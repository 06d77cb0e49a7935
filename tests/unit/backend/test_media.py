"""Media is only fetched from public addresses and from allowed hosts."""

from __future__ import annotations

import socket

import pytest
from aiohttp import web

from engine.backend.media import is_public, public_session


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "100.100.100.200",
        "168.63.129.16",
        "169.254.169.254",
        "224.0.0.1",
        "0.0.0.0",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::808:808",
        "2002:7f00:1::",
        "fc00::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_private_and_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_a_public_address_is_public_in_any_notation(address: str) -> None:
    assert is_public(address)


@pytest.mark.anyio
async def test_the_address_of_an_allowed_host_is_refused_under_any_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requested directly or after a redirect; the address itself is another name."""
    getaddrinfo = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *more, **options: getaddrinfo("127.0.0.1", *more, **options))

    async def redirect(request: web.Request) -> web.Response:
        raise web.HTTPFound(request.query["to"])

    async def media(_: web.Request) -> web.Response:
        return web.Response(text="media")

    app = web.Application()
    app.router.add_get("/", media)
    app.router.add_get("/redirect", redirect)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        async with public_session(ValueError, ["allowed.test"]) as session:

            async def text(url: str) -> str:
                async with session.get(url) as answer:
                    return await answer.text()

            allowed = f"http://allowed.test:{port}"
            assert await text(allowed) == "media"
            for other in (f"http://127.0.0.1:{port}", f"http://other.test:{port}", f"http://[::1]:{port}"):
                for url in (other, f"{allowed}/redirect?to={other}/"):
                    with pytest.raises(ValueError, match="public addresses only"):
                        await text(url)
            assert await text(f"{allowed}/redirect?to={allowed}/") == "media"
    finally:
        await runner.cleanup()
