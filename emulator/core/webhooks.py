"""Notify clients' webhooks that a job has ended.

Source: docs.runpod.io, "Webhook notifications": a POST with the body of /status; it "should return a 200 status code";
"if the call fails, Runpod will retry up to 2 more times with a 10-second delay between attempts".
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

import httpx

MAX_ATTEMPTS: Final = 3
RETRY_DELAY_S: Final = 10.0
_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)

Post = Callable[[str, dict[str, Any]], Awaitable[int]]
"""Posts a JSON document; returns the response's status."""


class Webhooks:
    """Delivers in the background.

    Args:
        post: sends one request.
        sleep: waits for a number of seconds.
    """

    def __init__(self, post: Post | None = None, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._post = post or _post
        self._sleep = sleep
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, url: str, document: dict[str, Any]) -> None:
        """Start to deliver a document."""
        task = asyncio.ensure_future(self.deliver(url, document))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def deliver(self, url: str, document: dict[str, Any]) -> None:
        """Deliver a document; log each failed attempt."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                status = await self._post(url, document)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                outcome = f"{type(error).__name__}: {error}"
            else:
                if status == HTTPStatus.OK:
                    return
                outcome = f"status {status}"
            logger.warning("webhook of job %s, attempt %d of %d: %s", document["id"], attempt, MAX_ATTEMPTS, outcome)
            if attempt < MAX_ATTEMPTS:
                await self._sleep(RETRY_DELAY_S)

    async def close(self) -> None:
        """Cancel all deliveries in progress."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _post(url: str, document: dict[str, Any]) -> int:
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
        # Not `json=`: httpx rejects NaN and lone surrogates, which an output may have.
        response = await client.post(
            url, content=json.dumps(document).encode(), headers={"Content-Type": "application/json"}
        )
        return response.status_code
