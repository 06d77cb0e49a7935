"""Fetches media that a job names by URL, from public addresses only.

A job must not read what only the worker's network can reach. Each request and each connection is checked when it is
made, so that neither a redirect nor a host name that resolves differently the second time bypasses the check. Hosts in
`ALLOWED_MEDIA_DOMAINS` may have any address, which is then not allowed for other hosts. Proxies of the environment
(`HTTPS_PROXY`) are not used, unlike in vLLM: a proxy resolves names itself, so its connections cannot be checked.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import socket
from collections.abc import Callable, Collection
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp

from engine.backend.media_errors import fetch_failure
from engine.errors import EngineResponseError, safe_str, without_urls

REFUSAL = (
    "media is fetched from public addresses only: send it as a data: URL, or add its host to ALLOWED_MEDIA_DOMAINS of "
    "the worker"
)
# The last 32 bits of these are an IPv4 address: NAT64 (RFC 6052), and IPv4-compatible addresses (RFC 4291).
_HOLDING_IPV4 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
# Not public, although Python's registries say so: local NAT64 (RFC 8215), and the host of an Azure machine.
_NOT_PUBLIC = (ipaddress.ip_network("64:ff9b:1::/48"), ipaddress.ip_network("168.63.129.16/32"))


def is_public(address: str) -> bool:
    """Return whether an address, without or with a zone, is reachable from everywhere; an embedded IPv4 one decides."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if embedded is None and any(ip in network for network in _HOLDING_IPV4):
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_PUBLIC)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def public_session(refuse: Callable[[str], Exception], hosts: Collection[str] = ()) -> aiohttp.ClientSession:
    """Return a session that connects to public addresses only.

    Args:
        refuse: makes the exception that is raised for any other address, from a message.
        hosts: names and addresses that may be connected to wherever they are.
    """
    allowed: set[str] = set()

    def check(address: str, host: str = "") -> None:
        """Accept an address of an allowed host, and refuse any other that is not public."""
        if host in hosts:
            allowed.add(address)
        elif (host or address not in allowed) and not is_public(address):
            raise refuse(REFUSAL)

    async def check_url(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        # An address in the URL itself is not resolved. A redirect is a request too.
        host = request.url.host or ""
        if _is_address(host):
            check(host, host)
        return await send(request)

    class Resolver(aiohttp.ThreadedResolver):
        async def resolve(self, host: str, *arguments: Any, **options: Any) -> list[aiohttp.abc.ResolveResult]:
            found = await super().resolve(host, *arguments, **options)
            for one in found:
                check(one["host"], host)
            return found

    def connect(address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, where = address
        check(where[0])
        return socket.socket(family, kind, protocol)

    connector = aiohttp.TCPConnector(resolver=Resolver(), socket_factory=connect)
    return aiohttp.ClientSession(connector=connector, middlewares=(check_url,))


async def download(url: str, max_bytes: int, hosts: Collection[str] = ()) -> bytes:
    """Return what an http(s) URL holds, fetched as vLLM fetches audio for a chat: by the same rules and time limits.

    Args:
        url: that a job names.
        max_bytes: of what it holds; a larger one is not read to its end.
        hosts: `ALLOWED_MEDIA_DOMAINS`.

    Raises:
        EngineResponseError: it cannot be fetched; vLLM's answer to a chat, but for the URL, which may hold a signature
            or a password.
    """
    from vllm import envs
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
    from vllm.multimodal.media.base import MediaIO
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY

    class Content(MediaIO):  # type: ignore[misc]
        """A medium that is not decoded."""

        def get_max_bytes(self) -> int:
            return max_bytes

        def load_bytes(self, data: bytes) -> bytes:
            return data

        # The other two are abstract, and for `data:` and `file:` URLs, which do not come here.
        def load_base64(self, media_type: str, data: str) -> bytes:
            raise NotImplementedError

        def load_file(self, filepath: Path) -> bytes:
            raise NotImplementedError

    connector = MEDIA_CONNECTOR_REGISTRY.load(envs.VLLM_MEDIA_CONNECTOR, allowed_media_domains=list(hosts))
    try:
        content: bytes = await connector.load_from_url_async(
            url, Content(), fetch_timeout=envs.VLLM_AUDIO_FETCH_TIMEOUT
        )
    except Exception as error:  # noqa: BLE001 (as vLLM's app does with whatever is raised there)
        reason = fetch_failure(error) or error
        if isinstance(reason, VLLMUnprocessableEntityError | VLLMValidationError):
            reason.parameter, reason.value = "file", None  # The value is the URL.
        response = create_error_response(reason)
        response.error.message = without_urls(response.error.message)
        if response.error.code == HTTPStatus.INTERNAL_SERVER_ERROR:
            response.error.message = f"the file cannot be fetched: {safe_str(reason)}"
        raise EngineResponseError(response.error.code, response.model_dump()) from None
    return content


def _hide_urls(record: logging.LogRecord) -> bool:
    record.msg, record.args = without_urls(record.getMessage()), ()
    return True


def install_public_media_connector() -> None:
    """Make vLLM fetch media through `public_session`; vLLM itself checks URLs against `ALLOWED_MEDIA_DOMAINS`.

    When it tries again, it logs the URL; here, without signature and password. What it cannot fetch ends with the
    status that `fetch_failure` gives it.
    """
    from vllm.connections import HTTPConnection
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

    class PublicConnection(HTTPConnection):  # type: ignore[misc]  # vLLM is not typed for --strict
        session: aiohttp.ClientSession | None = None

        def __init__(self, hosts: tuple[str, ...]) -> None:
            super().__init__()
            self.hosts = hosts

        async def get_async_client(self) -> aiohttp.ClientSession:
            self.session = self.session or public_session(VLLMValidationError, self.hosts)
            return self.session

        def get_sync_client(self) -> Any:
            raise VLLMValidationError("media is fetched asynchronously only")

    connection = functools.cache(PublicConnection)
    logging.getLogger(HTTPConnection.__module__).addFilter(_hide_urls)

    @MEDIA_CONNECTOR_REGISTRY.register("http")
    class PublicMediaConnector(MediaConnector):  # type: ignore[misc]
        def __init__(self, *arguments: Any, allowed_media_domains: list[str] | None = None, **options: Any) -> None:
            options["connection"] = connection(tuple(allowed_media_domains or ()))
            super().__init__(*arguments, allowed_media_domains=allowed_media_domains, **options)

        async def load_from_url_async(self, *arguments: Any, **options: Any) -> Any:
            try:
                return await super().load_from_url_async(*arguments, **options)
            except Exception as error:
                if (failure := fetch_failure(error)) is not None:
                    raise failure from None
                raise
