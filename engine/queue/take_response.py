"""The jobs in the platform's answer to a take: each that can be read is found, whatever stands beside it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from typing import Any

import aiohttp

from engine.errors import described
from engine.json_codec import decode

# A JSON string (or what has come of one), with its value where it is the key `id`; or a bracket.
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_TOKEN = re.compile(rb'"id"\s*+:\s*+(?P<id>%b|-?\d++)|%b?+|[\[\]{}]' % (_STRING, _STRING), re.DOTALL)

_log = logging.getLogger(__name__)


class Unreadable(str):
    """In the place of a job's input that cannot be read: why not."""

    __slots__ = ()


class TakeResponse(aiohttp.ClientResponse):
    """An answer to a take. The SDK asks it for its JSON, and would lose all of its jobs to one that is no JSON."""

    async def json(self, **_: Any) -> list[Any]:
        """The jobs in the body, as far as it has come."""
        body = bytearray()
        try:
            async for chunk in self.content.iter_any():
                body += chunk
        except (aiohttp.ClientError, OSError) as error:
            _log.warning("The answer to a take broke off: %s", described(error))
        return await jobs_in(bytes(body))


async def jobs_in(body: bytes) -> list[Any]:
    """What stands in the place of jobs, in order.

    Where the body cannot be read as a whole, its objects are read one by one: each that is complete is a job, whose
    input is `Unreadable` where it cannot be read; one that is not complete goes back to the queue, as it is not ours to
    say what it asks.
    """
    try:
        found = decode(body)
    except (ValueError, RecursionError) as error:
        _log.warning("The answer to a take cannot be read as a whole: %s", described(error))
        # In a thread: to look at each bracket of 10 MB takes seconds.
        return await asyncio.to_thread(lambda: [_job(*each) for each in _objects(body)])
    if isinstance(found, list):
        return found
    return [] if found is None else [found]


def _job(text: bytes, id_text: bytes | None) -> Any:
    try:
        return decode(text)
    except RecursionError:
        why = "the job is nested too deeply"
    except ValueError as error:
        why = f"the job is not JSON in UTF-8: {error}"
    try:
        return {"id": decode(id_text or b"null"), "input": Unreadable(why)}
    except ValueError:
        return None


def _objects(body: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """The outermost objects that are complete, each with the text of its `id`; however deep they are."""
    depth = start = 0
    id_text = None
    for token in _TOKEN.finditer(body):
        match token[0]:
            case b"{" if depth == 0:
                depth, start, id_text = 1, token.start(), None
            case b"{" | b"[" if depth:
                depth += 1
            case b"}" | b"]" if depth:
                depth -= 1
                if depth == 0:
                    yield body[start : token.end()], id_text
            case _ if depth == 1 and token["id"] is not None:
                id_text = token["id"]
