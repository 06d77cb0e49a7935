"""The connection of a poll, which can be closed for writing without losing a job that is on its way."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Any

import aiohttp


class TakeConnector(aiohttp.TCPConnector):
    """A connector that remembers its one connection, so that it can be closed for writing.

    While it is not `polling` it opens none: aiohttp repeats a GET once by itself when its connection ends.
    """

    transport: asyncio.Transport | None = None
    polling = True

    async def connect(self, *arguments: Any, **options: Any) -> aiohttp.connector.Connection:
        """Return a connection.

        Raises:
            aiohttp.ClientConnectionError: it is not polling.
        """
        if not self.polling:
            raise aiohttp.ClientConnectionError("polling has stopped")
        connection = await super().connect(*arguments, **options)
        if not self.polling:  # It stopped while the connection was opened.
            connection.close()
            raise aiohttp.ClientConnectionError("polling has stopped")
        self.transport = connection.transport
        return connection

    def stop_polling(self) -> None:
        """Close the connection for writing only, so that a job that was already sent still arrives.

        A server that has not answered yet sees the end of its client's stream and sends no job. The socket is shut down
        below TLS, as asyncio's transports cannot half-close it. RFC 8446, section 6.1, allows either side to end its
        own direction, and what was sent before is still decrypted.
        """
        self.polling = False
        transport, self.transport = self.transport, None
        if transport is None or transport.is_closing():
            return
        # OSError: the connection has just ended by itself.
        with suppress(OSError), socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as connection:
            connection.shutdown(socket.SHUT_WR)
