"""Fetching media that a job names by its address: from public addresses alone.

A job must not read what only the worker's network can reach. Each connection is checked as it is made, so that neither
a redirect nor a name that answers differently the second time gets around it.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import aiohttp

REFUSAL = (
    "media is fetched from public addresses alone: send it as a data: URL, or let ALLOWED_MEDIA_DOMAINS of the worker "
    "name its host"
)


def public_session(refuse: Callable[[str], Exception]) -> aiohttp.ClientSession:
    """A session that connects to public addresses alone; any other raises what `refuse` makes of the message."""

    def check(address: str) -> None:
        if not ipaddress.ip_address(address.partition("%")[0]).is_global:
            raise refuse(REFUSAL)

    class Resolver(aiohttp.ThreadedResolver):
        async def resolve(self, *arguments: Any, **options: Any) -> list[aiohttp.abc.ResolveResult]:
            found = await super().resolve(*arguments, **options)
            for one in found:
                check(one["host"])
            return found

    def connect(address: aiohttp.AddrInfoType) -> socket.socket:
        # An address in the URL itself is not resolved.
        family, kind, protocol, _, where = address
        check(where[0])
        return socket.socket(family, kind, protocol)

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=Resolver(), socket_factory=connect))
