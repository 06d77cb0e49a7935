"""Finds the jobs in the platform's response to a take, also where a part of it cannot be read."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from typing import Any

import aiohttp

from engine.errors import safe_str
from engine.jobs.inputs import UnreadableInput
from engine.json_codec import decode

# A JSON string, possibly cut off; with its value where it is the key `id`; or a bracket.
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_TOKEN = re.compile(rb'"id"\s*+:\s*+(?P<id>%b|-?\d++)|%b?+|[\[\]{}]' % (_STRING, _STRING), re.DOTALL)

_log = logging.getLogger(__name__)


class TakeResponse(aiohttp.ClientResponse):
    """A response to a take. The SDK calls `json()`, and would lose all jobs of a response if one cannot be decoded."""

    async def json(self, **_: Any) -> list[Any]:
        """Return the jobs in the body, as far as it was received."""
        body = bytearray()
        try:
            async for chunk in self.content.iter_any():
                body += chunk
        except (aiohttp.ClientError, OSError) as error:
            _log.warning("The response to a take is incomplete: %s", safe_str(error))
        return await jobs_in(bytes(body))


async def jobs_in(body: bytes) -> list[Any]:
    """Return the items of the response, in order.

    If the body cannot be decoded as one document, its objects are decoded one by one. Each complete object is a job;
    its input is an `UnreadableInput` if it cannot be decoded. An incomplete job is left to the platform, which gives it
    to a worker again.
    """
    try:
        found = decode(body)
    except (ValueError, RecursionError) as error:
        _log.warning("The response to a take cannot be decoded as one document: %s", safe_str(error))
        # In a thread: scanning 10 MB bracket by bracket takes seconds.
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
        return {"id": decode(id_text or b"null"), "input": UnreadableInput(why)}
    except ValueError:
        return None


def _objects(body: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """Yield the complete outermost objects, each with the JSON text of its `id`, without recursion."""
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
