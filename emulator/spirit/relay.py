"""The answer to one proxied request, on its way from the worker's POST to the client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

# How many pieces may wait for a slow client before the worker's POST is read no further.
_MAX_WAITING_PIECES: Final = 16
T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody reads the answer any more: the client has disconnected, or a time limit is over."""


class AnswerBrokenError(Exception):
    """The worker's POST ended before its end was sent."""


@dataclass(frozen=True)
class Head:
    """The start of an answer: a status, and headers as raw bytes."""

    status: int
    headers: list[tuple[bytes, bytes]]


class Relay:
    """Carries an answer piece by piece; for one event loop.

    `head` is done when the answer has begun, `client_gone` when nobody reads it any more.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.head: asyncio.Future[Head] = loop.create_future()
        self.client_gone: asyncio.Future[None] = loop.create_future()
        # None is the end, an exception its lack.
        self._pieces: asyncio.Queue[bytes | AnswerBrokenError | None] = asyncio.Queue(_MAX_WAITING_PIECES)

    # The worker's side.

    def begin(self, head: Head) -> None:
        """Start the answer; to be called once."""
        self.head.set_result(head)

    async def send(self, piece: bytes | None) -> None:
        """Pass a piece on, or with None the end; wait while the client is slow.

        Raises:
            ClientGoneError: nobody reads it.
        """
        await self.unless_gone(self._pieces.put(piece))

    async def unless_gone(self, awaitable: Awaitable[T]) -> T:
        """Return what the awaitable returns, unless nobody reads the answer any more before that.

        Raises:
            ClientGoneError: nobody reads it; the awaitable is cancelled.
        """
        waiting = asyncio.ensure_future(awaitable)
        either: set[asyncio.Future[Any]] = {waiting, self.client_gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self.client_gone.done():
                raise ClientGoneError
            return waiting.result()
        finally:
            waiting.cancel()

    async def break_off(self) -> None:
        """End the answer without its end: the worker's POST was cut."""
        with suppress(ClientGoneError):
            await self.unless_gone(self._pieces.put(AnswerBrokenError()))

    # The client's side.

    async def receive(self) -> bytes | None:
        """Return the next piece, None at the end.

        Raises:
            AnswerBrokenError: the worker's POST was cut.
        """
        piece = await self._pieces.get()
        if isinstance(piece, AnswerBrokenError):
            raise piece
        return piece

    def leave(self) -> None:
        """Stop reading; whatever the worker still sends is for nobody."""
        if not self.client_gone.done():
            self.client_gone.set_result(None)
