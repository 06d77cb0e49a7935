"""Media URLs in jobs: only public addresses are fetched, unless a setting allows the host."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from PIL import Image

from emulator.free_port import free_port
from engine.backend import media
from engine.backend.media_errors import fetch_failure
from engine.errors import EngineResponseError

# Importing vLLM issues deprecation warnings.
pytestmark = [pytest.mark.in_process, pytest.mark.filterwarnings("ignore")]


# Sizes of what the server has sent of large files.
sent: list[int] = []


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Serves a picture, or what the path asks for."""

    silence = threading.Event()

    def do_GET(self) -> None:
        what, _, rest = self.path.partition("?")[0].removeprefix("/").partition("/")
        match what:
            case "to":
                self.send_response(302)
                self.send_header("Location", f"http://{self.headers['Host']}/".replace("127.0.0.1", rest))
                self.end_headers()
            case "status":
                self.send_error(int(rest))
            case "size":
                self._send_zeros(int(rest))
            case "silent":
                self.silence.wait()
            case "cut":
                self._send(500, bytes(100))
            case "picture.png" | "":
                self._send(len(picture()), picture())

    def _send(self, said_bytes: int, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(said_bytes))
        self.end_headers()
        self.wfile.write(body)

    def _send_zeros(self, size_bytes: int) -> None:
        self.send_response(200)
        if size_bytes < 2**20:  # Of a larger file, the size is not said before.
            self.send_header("Content-Length", str(size_bytes))
        self.end_headers()
        with suppress(ConnectionError):
            for start in range(0, size_bytes, 2**16):
                self.wfile.write(bytes(min(2**16, size_bytes - start)))
                sent.append(2**16)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Serve a picture on the loopback interface; yield its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}/picture.png"
        Handler.silence.set()
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


def download(url: str, max_bytes: int = 1000, hosts: Sequence[str] = ("127.0.0.1",)) -> bytes:
    """Download a file as a job that names it has it downloaded."""
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY

    media.install_public_media_connector()

    async def once() -> bytes:
        connector: Any = MEDIA_CONNECTOR_REGISTRY.load("http", allowed_media_domains=list(hosts))
        try:
            return await media.download(url, max_bytes, hosts)
        finally:
            await (await connector.connection.get_async_client()).close()
            connector.connection.session = connector.connection._async_client = None

    return asyncio.run(once())


def refusal(url: str, hosts: Sequence[str] = ("127.0.0.1",)) -> tuple[int, str]:
    """Return status and message of a download that fails."""
    with pytest.raises(EngineResponseError) as refused:
        download(url, hosts=hosts)
    document = refused.value.document()
    return document["status"], document["error"]["message"]


def test_a_file_is_downloaded_from_a_listed_host(url: str) -> None:
    assert download(url) == picture()
    assert download(url.replace("picture.png", "to/127.0.0.1")) == picture()
    assert download(url.replace("picture.png", "size/1000")) == bytes(1000)


def test_a_file_is_refused_by_the_rules_for_other_media(url: str) -> None:
    redirected = url.replace("picture.png", "to/127.0.0.2")
    expected = {
        (redirected, ("127.0.0.1",)): (400, "public addresses only"),
        (url, ()): (400, "public addresses only"),
        (url.replace("127.0.0.1", "localhost"), ()): (400, "public addresses only"),
        (url, ("a.org",)): (400, "allowed domains"),
        (url.replace("picture.png", "status/404"), ("127.0.0.1",)): (422, "answered with status 404: check the URL"),
        (url.replace("picture.png", "status/403"), ("127.0.0.1",)): (422, "answered with status 403: check the URL"),
    }

    for (address, hosts), (status, reason) in expected.items():
        found = refusal(address, hosts)
        assert (found[0], reason in found[1]) == (status, True), found


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("status/500", 502, "the URL's server answered with status 500: try again later"),
        ("status/503", 502, "the URL's server answered with status 503: try again later"),
        ("status/429", 502, "the URL's server answered with status 429: try again later"),
        ("silent", 504, "the URL's server did not answer in time: try again later"),
        ("closed", 502, "the URL's server cannot be reached, or has closed the connection (ServerDisconnectedError"),
        ("cut", 502, "the URL's server cannot be reached, or has closed the connection (ClientPayloadError"),
        (":refused", 502, "the URL's server cannot be reached, or has closed the connection (ClientConnectorError"),
    ],
)
def test_a_url_that_cannot_be_fetched_now_is_an_error_that_says_try_again(
    path: str, status: int, reason: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a job that names a file, and in a chat with a picture, where vLLM makes the answer."""
    from vllm import envs
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    for name in ("VLLM_AUDIO_FETCH_TIMEOUT", "VLLM_IMAGE_FETCH_TIMEOUT"):
        monkeypatch.setitem(envs.environment_variables, name, lambda: 0.3)
    where = url.replace("picture.png", path)
    if path == ":refused":
        where = f"http://127.0.0.1:{free_port()}/a.wav"

    with pytest.raises(EngineResponseError) as refused:
        download(where)
    with pytest.raises(Exception, match=r"try again later") as in_chat:
        fetch(where, ["127.0.0.1"])

    document = refused.value.document()
    answer = create_error_response(in_chat.value).error
    assert (document["status"], document["retryable"]) == (status, True)
    assert (document["status"], document["error"]["message"]) == (answer.code, answer.message)
    assert answer.message.startswith(reason)
    assert "http://" not in answer.message


def test_a_refusal_in_a_chat_has_no_url(url: str) -> None:
    signed = url.replace("picture.png", "status/403?Signature=s3cret")

    with pytest.raises(Exception, match="answered with status 403") as refused:
        fetch(signed, ["127.0.0.1"])

    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (aiohttp.ClientConnectorDNSError(Mock(host="a.invalid"), socket.gaierror(socket.EAI_NONAME, "unknown")), 422),
        (aiohttp.ClientConnectorDNSError(Mock(host="a.invalid"), socket.gaierror(socket.EAI_AGAIN, "later")), 502),
        (aiohttp.ClientConnectorCertificateError(Mock(host="a"), ssl.SSLCertVerificationError("self-signed")), 422),
        (ConnectionResetError("by peer"), 502),
    ],
)
def test_what_a_test_cannot_provoke_has_its_status_too(error: Exception, status: int) -> None:
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    failure = fetch_failure(error)

    assert failure is not None
    assert create_error_response(failure).error.code == status


def test_a_file_that_is_no_picture_is_not_taken_for_a_failure_of_its_server(url: str) -> None:
    with pytest.raises(ValueError, match="cannot identify image"):
        fetch(url.replace("picture.png", "size/100"), ["127.0.0.1"])


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (503, 2)])
def test_a_signed_url_is_in_no_error_and_no_log(
    status: int, attempts: int, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its signature is a secret, and so is a password in it. vLLM logs the URL before it tries again."""
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", str(attempts))
    monkeypatch.setattr("vllm.connections._RETRY_BACKOFF_FACTOR", 0.01)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    signed = url.replace("picture.png", f"status/{status}?Signature=s3cret").replace("//", "//user:s3cret@")

    _, message = refusal(signed)

    assert str(status) in message
    # A set, as a line can be captured twice.
    failed = {line for line in caplog.messages if line.startswith("HTTP fetch failed for (URL) (attempt 1/2")}
    assert len(failed) == attempts - 1
    for text in (message, caplog.text):
        assert "s3cret" not in text
        assert "image_url" not in text


def test_a_file_above_the_limit_is_not_downloaded_to_its_end(url: str) -> None:
    sent.clear()
    for size_bytes in (1001, 2**28):
        status, message = refusal(url.replace("picture.png", f"size/{size_bytes}"))
        assert (status, "exceed" in message) == (400, True), message

    assert sum(sent) < 2**26


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
