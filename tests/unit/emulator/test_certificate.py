"""The TLS certificate: who trusts it, and what happens to its files."""

from __future__ import annotations

import os
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import certifi
import pytest

from emulator.certificate import LOOPBACK, Certificate
from tests.unit.emulator.conftest import Site, emulator_with

# HTTP clients in a worker: the SDK's two (aiohttp, requests), and those of the Hugging Face Hub and of vLLM.
_HTTP_CLIENTS = """
import asyncio, ssl, sys, aiohttp, httpx, httpx2, requests
async def get():
    async with aiohttp.ClientSession() as session, session.get(sys.argv[1]) as response:
        return response.status
print(asyncio.run(get()), *(client.get(sys.argv[1]).status_code for client in (httpx, httpx2, requests)))
print(len(ssl.create_default_context().get_ca_certs()))
"""


@pytest.fixture
def certificate() -> Iterator[Certificate]:
    created = Certificate(["192.0.2.7", "box.example"], {})
    yield created
    created.remove()


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """Do a TLS handshake in memory.

    Raises:
        ssl.SSLError: it fails.
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
def test_the_certificate_passes_strict_verification_for_the_loopback_and_its_hosts(
    certificate: Certificate, host: str
) -> None:
    client = ssl.create_default_context(cafile=certificate.ca_file)
    # The default from Python 3.13 on.
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    handshake(certificate.context, client, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(certificate.context, client, "other.example")


def test_the_ca_of_one_emulator_does_not_verify_another(certificate: Certificate) -> None:
    other = Certificate([], {})
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(certificate.context, ssl.create_default_context(cafile=other.ca_file), "localhost")
    other.remove()


def test_the_private_key_file_is_readable_only_by_its_owner_and_deleted_after_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[int] = []
    load = ssl.SSLContext.load_cert_chain

    def load_and_record(context: ssl.SSLContext, chain: Path, key: Path) -> None:
        modes.extend(stat.S_IMODE(path.stat().st_mode) for path in (key, key.parent))
        load(context, chain, key)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load_and_record)
    created = Certificate([], {})
    directory = created.ca_file.parent
    assert modes == [0o600, 0o700]
    assert [path.name for path in directory.iterdir() if b"PRIVATE KEY" in path.read_bytes()] == []
    created.remove()
    assert not directory.exists()


def test_bundles_have_the_previously_trusted_cas_and_the_emulators(tmp_path: Path) -> None:
    proxy = tmp_path / "proxy.pem"
    proxy.write_text("a company's CA")
    created = Certificate([], {"CURL_CA_BUNDLE": str(proxy)})
    own_ca = created.ca_file.read_text()
    bundles = {name: Path(path).read_text() for name, path in created.environment.items()}
    created.remove()
    assert bundles == {
        "SSL_CERT_FILE": f"{Path(certifi.where()).read_text()}\n{own_ca}",
        "REQUESTS_CA_BUNDLE": f"a company's CA\n{own_ca}",
    }


def test_every_http_client_in_a_worker_trusts_the_emulator_and_the_public_cas() -> None:
    with emulator_with({"id": "ep"}, tls=True) as emulator:
        assert emulator._certificate is not None
        variables = {**os.environ, **emulator._certificate.environment}
        ran = subprocess.run(
            [sys.executable, "-c", _HTTP_CLIENTS, emulator.url],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
    statuses, count = ran.stdout.splitlines() or [ran.stderr, "0"]
    assert statuses == "200 200 200 200"
    assert int(count) > 100


def test_the_ca_file_is_deleted_at_shutdown() -> None:
    with emulator_with({"id": "ep"}, tls=True) as emulator:
        assert emulator.url.startswith("https://127.0.0.1:")
        assert emulator.ca_file is not None
        assert emulator.ca_file.exists()
    assert not emulator.ca_file.parent.exists()


def test_shutdown_does_not_wait_for_idle_tls_clients(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack, emulator_with({"id": "ep"}, tls=True) as emulator:
        Site(emulator, stack).client.get("/health").raise_for_status()
    assert "timeout graceful shutdown exceeded" not in caplog.text
