"""Fetching media that a job names by its address: from public addresses alone.

A job must not read what only the worker's network can reach. Each request and each connection is checked as it is made,
so that neither a redirect nor a name that answers differently the second time gets around it. Hosts that
`ALLOWED_MEDIA_DOMAINS` names may have any address; no other host may have it for that. Proxies of the environment
(`HTTPS_PROXY`) are not used, as vLLM would: a proxy looks names up itself, and what it connects to cannot be checked.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Collection
from typing import Any

import aiohttp

REFUSAL = (
    "media is fetched from public addresses alone: send it as a data: URL, or let ALLOWED_MEDIA_DOMAINS of the worker "
    "name its host"
)


# An IPv4 address may stand in the last 32 bits of these: behind NAT64, and as IPv6 once wrote them.
_HOLDING_IPV4 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
# Not public, whatever the registries that Python knows say: NAT64 of one's own, and the host of an Azure machine.
_NOT_PUBLIC = (ipaddress.ip_network("64:ff9b:1::/48"), ipaddress.ip_network("168.63.129.16/32"))


def is_public(address: str) -> bool:
    """Whether an address, without or with a zone, can be reached from everywhere; an IPv4 address in it decides."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        held = ip.ipv4_mapped or ip.sixtofour
        if held is None and any(ip in network for network in _HOLDING_IPV4):
            held = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if held is not None:
            return is_public(str(held))
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
    """A session that connects to public addresses alone; any other raises what `refuse` makes of the message.

    Args:
        refuse: makes an exception of a message.
        hosts: names and addresses that may be connected to wherever they are.
    """
    allowed: set[str] = set()

    def check(address: str, host: str = "") -> None:
        """Let an address of an allowed host be, and refuse any other that is not public."""
        if host in hosts:
            allowed.add(address)
        elif (host or address not in allowed) and not is_public(address):
            raise refuse(REFUSAL)

    async def check_url(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        # An address in the URL itself is not looked up. A redirect comes by here too.
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
