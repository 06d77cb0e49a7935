"""Whether a client has disconnected."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import pytest

from emulator.core.long_poll import is_disconnected


class FakeTransport:
    """A transport of a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, _name: str) -> Any:
        return self._connection


@pytest.mark.parametrize("unread", [b"", b"unread"])
def test_a_half_closed_connection_is_disconnected_even_with_unread_bytes(unread: bytes) -> None:
    server, client = socket.socketpair()
    with server, client:
        transport = cast("asyncio.Transport", FakeTransport(server))
        client.sendall(unread)
        assert not is_disconnected(transport)
        client.shutdown(socket.SHUT_WR)
        assert is_disconnected(transport)
