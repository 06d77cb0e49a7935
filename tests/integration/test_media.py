"""Media URLs in jobs: only public addresses are fetched, unless a setting allows the host."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from PIL import Image

from engine.backend import media

# Importing vLLM issues deprecation warnings.
pytestmark = [pytest.mark.in_process, pytest.mark.filterwarnings("ignore")]


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Serve a picture on the loopback interface; yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", address.replace("127.0.0.1", self.path.removeprefix("/to/")))
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            self.wfile.write(picture())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as web:
        address = f"http://127.0.0.1:{web.server_port}/picture.png"
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield address
        web.shutdown()
        thread.join()


def fetch(url: str, domains: list[str] | None = None) -> tuple[int, int]:
    """Fetch a picture as vLLM's chat route does, and return its size."""
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY

    media.install_public_media_connector()
    connector: Any = MEDIA_CONNECTOR_REGISTRY.load("http", allowed_media_domains=domains)

    async def once() -> tuple[int, int]:
        try:
            size: tuple[int, int] = (await connector.fetch_image_async(url)).size
            return size
        finally:
            await (await connector.connection.get_async_client()).close()
            connector.connection.session = connector.connection._async_client = None

    return asyncio.run(once())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0.0.0.0"])
def test_a_private_address_is_refused_in_any_notation(host: str, url: str) -> None:
    with pytest.raises(Exception, match=r"public addresses only|Invalid URL"):
        fetch(url.replace("127.0.0.1", host))


def test_a_private_host_that_a_setting_allows_is_fetched(url: str) -> None:
    assert fetch(url, ["127.0.0.1"]) == (4, 3)


def test_an_allowed_host_may_redirect_only_to_public_addresses_and_itself(url: str) -> None:
    assert fetch(url.replace("picture.png", "to/127.0.0.1"), ["127.0.0.1"]) == (4, 3)
    with pytest.raises(Exception, match="public addresses only"):
        fetch(url.replace("picture.png", "to/127.0.0.2"), ["127.0.0.1"])


def test_with_allowed_hosts_all_others_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must be from one of the allowed domains"):
        fetch(url.replace("127.0.0.1", "localhost"), ["127.0.0.1"])


def test_a_picture_in_a_data_url_is_accepted() -> None:
    assert fetch("data:image/png;base64," + base64.b64encode(picture()).decode()) == (4, 3)
