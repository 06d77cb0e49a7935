"""The calls of a worker to Spirit's agent beside it, and to webhooks: one attempt each, or until they arrive.

Unlike the SDK's, these sessions have no limit of 100 connections or 300 s, and answers, results and acknowledgements
are tried again. Source of the protocol: `manager.py` and `worker.py` of spirit-gpu 0.1.0.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import quote, urljoin

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from engine.errors import DeliveryError, RateLimitedError, RefusedDeliveryError, safe_str
from engine.json_codec import decode
from engine.queue.take_connector import TakeConnector
from engine.run_clock import CLOCK

_CALL_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 10.0
_FIRST_WAIT_S = 0.1
_MAX_WAIT_S = 5.0
_MIN_ATTEMPT_S = 1.0
# How much of the body of a refusal is logged.
_MAX_ERROR_BODY_BYTES = 200
_RETRYABLE_STATUSES = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}


class ConnectionLostError(DeliveryError):
    """The connection ended after the delivery had begun: how much of it has arrived is unknown."""


class SpiritAgent:
    """Connections to the agent on one event loop: `async with SpiritAgent(url) as agent`.

    Args:
        url: scheme, host and port of the agent.
        health_header: name of the header that says whether the agent is healthy.
    """

    def __init__(self, url: str, health_header: str) -> None:
        self._url = url
        self._health_header = health_header
        self._connector = TakeConnector()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Open the sessions."""
        short = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S, sock_connect=_CONNECT_TIMEOUT_S)
        unlimited = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
        self._takes = await self._session(self._connector, unlimited)
        self._calls = await self._session(aiohttp.TCPConnector(limit=0), short)
        # A connection of its own for each: one that was idle may end just as an answer begins, which looks like a
        # client that has gone.
        self._answers = await self._session(aiohttp.TCPConnector(limit=0, force_close=True), unlimited)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancel what runs in the background, and close the sessions."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def _session(self, connector: aiohttp.BaseConnector, limits: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(connector=connector, timeout=limits, cookie_jar=aiohttp.DummyCookieJar())
        return await self._stack.enter_async_context(session)

    def run_in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run this until it ends or the agent's connections are closed."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Taking

    async def take(self) -> tuple[dict[str, Any] | None, bool]:
        """Return one task, if there is one, and whether the agent is healthy.

        Raises:
            RateLimitedError: the agent asks to wait.
            DeliveryError: it answered with an error.
            TypeError, ValueError: its answer is not a JSON object.
            aiohttp.ClientError, OSError: it cannot be reached.
        """
        self._connector.polling = True
        async with self._takes.get(urljoin(self._url, "/apis/v1/request")) as answer:
            is_healthy = answer.headers.get(self._health_header) != "false"
            body = await answer.read()
        if answer.status == HTTPStatus.NOT_FOUND:
            return None, is_healthy
        if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
            raise RateLimitedError("the agent answered with status 429")
        if answer.status != HTTPStatus.OK:
            raise DeliveryError(_refusal(answer.status, body))
        document = decode(body)
        if not isinstance(document, dict):
            raise TypeError("the agent answered with a task that is not a JSON object")
        return document, is_healthy

    def stop_polling(self) -> None:
        """End a take that the agent holds open, and still receive a task that is on its way."""
        self._connector.stop_polling()

    # Delivering, in one attempt

    async def answer(self, task_id: str, status: int, content_type: str, body: bytes | AsyncIterator[bytes]) -> None:
        """Post the answer to a proxied request; an iterator is posted piece by piece.

        Raises:
            RefusedDeliveryError, ConnectionLostError, DeliveryError: as `post`.
        """
        headers = {"Content-Type": content_type} if content_type else {}
        path = f"/apis/v1/request-proxy/{quote(task_id, safe='')}?statusCode={status}"
        await self._post(self._answers, urljoin(self._url, path), body, headers)

    async def call(self, kind: str, task_id: str, body: bytes) -> None:
        """Post to `request-ack`, `request-metric` or `request-result` of a task.

        Raises:
            RefusedDeliveryError, ConnectionLostError, DeliveryError: as `post`.
        """
        headers = {"Content-Type": "application/octet-stream"}
        await self._post(self._calls, urljoin(self._url, f"/apis/v1/{kind}/{quote(task_id, safe='')}"), body, headers)

    async def webhook(self, url: str, task_id: str, status: int, body: bytes) -> None:
        """Post a result to a client's webhook, which must answer with 200.

        Raises:
            RefusedDeliveryError, ConnectionLostError, DeliveryError: as `post`.
        """
        query = {"requestID": task_id, "statusCode": str(status)}
        await self._post(self._calls, url, body, {"Content-Type": "application/json"}, query)

    @staticmethod
    async def _post(
        session: aiohttp.ClientSession,
        url: str,
        body: bytes | AsyncIterator[bytes],
        headers: dict[str, str],
        query: dict[str, str] | None = None,
    ) -> None:
        """Post a body.

        Raises:
            RefusedDeliveryError: it is not accepted, and will not be.
            ConnectionLostError: the connection ended before the answer.
            DeliveryError: it did not arrive; another attempt may succeed.
        """
        try:
            async with session.post(url, data=body, headers=headers, params=query, allow_redirects=False) as answer:
                text = await answer.read()
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, ValueError):  # A webhook's URL is the client's.
            raise RefusedDeliveryError("the URL is not valid") from None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise DeliveryError(safe_str(error)) from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ConnectionLostError(safe_str(error)) from None
        if answer.status < HTTPStatus.MULTIPLE_CHOICES:
            return
        if answer.status < HTTPStatus.INTERNAL_SERVER_ERROR and answer.status not in _RETRYABLE_STATUSES:
            raise RefusedDeliveryError(_refusal(answer.status, text), answer.status)
        raise DeliveryError(_refusal(answer.status, text))


async def until_delivered(attempt: Callable[[], Awaitable[None]], until: Callable[[], float]) -> None:
    """Make attempts until one succeeds or the time is over, also for one that gets no answer.

    Args:
        attempt: raises `DeliveryError` if another one may succeed.
        until: returns when the time is over, by `engine.run_clock`.

    Raises:
        Exception: the last attempt's.
    """
    backoff = wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_MAX_WAIT_S)
    async for state in AsyncRetrying(
        stop=lambda _: CLOCK.now() >= until(),
        wait=lambda state: min(backoff(state), max(until() - CLOCK.now(), 0)),
        retry=retry_if_exception(lambda error: isinstance(error, DeliveryError)),
        reraise=True,
    ):
        with state:
            try:
                async with asyncio.timeout(max(until() - CLOCK.now(), _MIN_ATTEMPT_S)):
                    await attempt()
            except TimeoutError:
                raise DeliveryError("no answer in time") from None


def _refusal(status: int, body: bytes) -> str:
    # The error page of a gateway may be in any encoding.
    return f"status {status}: {body[:_MAX_ERROR_BODY_BYTES].decode(errors='replace')}"
