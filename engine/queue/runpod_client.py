"""The platform's worker protocol, through the SDK, which the serving process imports here alone.

Of the SDK we keep the take, the stop channel, the ping and the log; its loop is replaced by ours. Where an SDK lacks
what our loop needs, the worker says so and uses the SDK's own loop, with the engine watched all the same.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from enum import Enum
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import uvloop

from engine.errors import BusyError, DeliveryError, RefusedDeliveryError, described
from engine.queue.take_response import TakeResponse

TESTED_VERSIONS = ("1.12.",)
# How often the engine is looked at under the SDK's own loop, and what its jobs may take to end once it has failed.
_WATCH_S = 0.5
_STOCK_GRACE_S = 3.0
# The SDK gives a take up after so long; nothing that the platform holds open should outlive it.
TAKE_TIMEOUT_S = 90.0
# How long a take that was let go may still bring a job: the platform closes its side after a round trip, as a rule.
LET_GO_S = 2.0
_POST_TIMEOUT_S = 60.0
# How much of a refusal is told.
_TOLD_BYTES = 200
# Statuses of answers that another try may not get.
_PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}

_log = logging.getLogger(__name__)


class Delivery(Enum):
    """What is posted for a job: an output of its stream, or its result."""

    STREAM = "stream"
    RESULT = "result"


class _TakeConnector(aiohttp.TCPConnector):
    """A connector that knows the one connection that it has given out.

    While nothing is `wanted` it gives out none: aiohttp tries a GET once more by itself when its connection ends.
    """

    transport: asyncio.Transport | None = None
    wanted = True

    async def connect(self, *arguments: Any, **options: Any) -> aiohttp.connector.Connection:
        if not self.wanted:
            raise aiohttp.ClientConnectionError("no job is wanted any more")
        connection = await super().connect(*arguments, **options)
        if not self.wanted:  # It was let go while the connection was made.
            connection.close()
            raise aiohttp.ClientConnectionError("no job is wanted any more")
        self.transport = connection.transport
        return connection


class Platform:
    """What the loop needs of the platform, on one event loop: `async with Platform() as platform`."""

    def __init__(self) -> None:
        from runpod.http_client import TooManyRequests, get_auth_header
        from runpod.serverless.modules import rp_http, rp_job
        from runpod.serverless.modules.worker_state import JobsProgress

        self._sdk_job = rp_job
        self._busy: type[Exception] = TooManyRequests
        self._held = JobsProgress()
        self._headers = get_auth_header()
        self._urls = {Delivery.STREAM: rp_http.JOB_STREAM_URL, Delivery.RESULT: rp_http.JOB_DONE_URL}
        self._connector = _TakeConnector()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Open the connections."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        self._takes = await self._session(timeout, self._connector, response_class=TakeResponse)
        self._stops = await self._session(timeout, aiohttp.TCPConnector())
        self._posts = await self._session(aiohttp.ClientTimeout(_POST_TIMEOUT_S), aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._stack.aclose()

    async def _session(
        self, limits: aiohttp.ClientTimeout, connector: aiohttp.TCPConnector, **options: Any
    ) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=limits, **options)
        return await self._stack.enter_async_context(session)

    async def take(self, count: int) -> list[Any]:
        """Ask for up to `count` jobs; empty when none came while the platform held the call.

        Whatever stood in the place of a job comes as it is: `engine.queue.take_response`.

        It is never cut off from our side while the platform may be answering: a job could be on its way. Call `let_go`.

        Raises:
            BusyError: the platform asks us to wait.
            aiohttp.ClientError, OSError: it could not be asked.
        """
        self._connector.wanted = True
        try:
            return await self._sdk_job.get_job(self._takes, count) or []
        except self._busy:
            raise BusyError("the platform answered with status 429") from None

    def let_go(self) -> None:
        """Tell the platform that no job is wanted any more, but hear what it is saying.

        The connection is closed from our side alone: a server that has not answered yet sees that nobody asks, and a
        job that it has sent still arrives. Below TLS, which asyncio's transports cannot close by halves: RFC 8446,
        section 6.1, lets either side end alone, and what has been sent before is still decrypted.
        """
        self._connector.wanted = False
        transport, self._connector.transport = self._connector.transport, None
        if transport is None or transport.is_closing():
            return
        # A connection that has just ended has nothing left to close.
        with suppress(OSError), socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as connection:
            connection.shutdown(socket.SHUT_WR)

    async def stops(self) -> list[str]:
        """Wait for jobs that are to be stopped; empty when there were none while the platform held the call.

        Raises:
            BusyError: the platform asks us to wait.
            aiohttp.ClientError, OSError: it could not be asked.
        """
        try:
            async with asyncio.timeout(TAKE_TIMEOUT_S):
                return list(await self._sdk_job.get_stop_signals(self._stops))
        except TimeoutError:
            return []
        except self._busy:
            raise BusyError("the platform answered with status 429") from None

    async def post(self, kind: Delivery, job_id: str, body: bytes) -> None:
        """Deliver, in one try.

        Raises:
            RefusedDeliveryError: the platform does not want it, and will not.
            DeliveryError: it did not arrive, or it cannot be known; another try may succeed.
        """
        url = self._urls[kind].replace("$ID", quote(job_id, safe=""))
        url += f"&isStream={'true' if kind is Delivery.RESULT else 'false'}"
        headers = {"X-Request-ID": job_id, "Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8"}
        try:
            async with self._posts.post(url, data=body, headers=headers) as answer:
                # A gateway's page may be in any encoding.
                text = (await answer.read())[:_TOLD_BYTES].decode(errors="replace")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise DeliveryError(described(error)) from None
        if answer.status < HTTPStatus.BAD_REQUEST:
            return
        message = f"status {answer.status}: {text}"
        if answer.status < HTTPStatus.INTERNAL_SERVER_ERROR and answer.status not in _PASSING:
            raise RefusedDeliveryError(message, answer.status)
        raise DeliveryError(message)

    def hold(self, job_id: str) -> None:
        """From now on the ping names the job as one that we have."""
        self._held.add(job_id)

    def release(self, job_id: str) -> None:
        """From now on the ping does not name the job any more."""
        self._held.remove(job_id)


def missing_interface() -> str | None:
    """What an SDK lacks of that which our loop needs, in words; None if it has all of it.

    Looked for in the SDK itself: its version says neither what an upgrade has moved nor what it has left alone.
    """
    try:
        from runpod.http_client import TooManyRequests, get_auth_header
        from runpod.serverless import worker
        from runpod.serverless.modules import rp_http, rp_job, rp_scale
        from runpod.serverless.modules.worker_state import JobsProgress

        calls: list[tuple[Callable[..., Any], tuple[object, ...]]] = [
            (get_auth_header, ()),
            (rp_job.get_job, (None, 1)),
            (rp_job.get_stop_signals, (None,)),
            (JobsProgress, ()),
            (JobsProgress.add, (None, "id")),
            (JobsProgress.remove, (None, "id")),
            (rp_scale.JobScaler, ({},)),
            (rp_scale.JobScaler.start, (None,)),
        ]
        for call, arguments in calls:
            inspect.signature(call).bind(*arguments)
        checks = {
            "get_job and get_stop_signals are coroutines": all(
                inspect.iscoroutinefunction(call) for call in (rp_job.get_job, rp_job.get_stop_signals)
            ),
            "TooManyRequests is an exception": issubclass(TooManyRequests, Exception),
            "the URLs of deliveries are text": all(
                isinstance(url, str) for url in (rp_http.JOB_STREAM_URL, rp_http.JOB_DONE_URL)
            ),
            "the worker starts rp_scale.JobScaler": worker.rp_scale is rp_scale,
        }
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return described(error)
    return next((f"not so: {what}" for what, is_so in checks.items() if not is_so), None)


def import_sdk() -> None:
    """Import the SDK, which takes a second and a half."""
    importlib.import_module("runpod.serverless.modules.rp_scale")


def serve(
    handler: Callable[..., Any],
    run: Callable[[Platform], Awaitable[int]],
    concurrency: int,
    failure: Callable[[], str | None],
) -> int:
    """Let the SDK start the worker, with `run` in the place of its loop; return the exit status.

    Args:
        handler: an async generator of a job's outputs, as the SDK registers it.
        run: takes jobs from the platform until it is told to stop; gives the exit status.
        concurrency: most jobs at once, where the SDK's own loop has to be used.
        failure: what is wrong with the engine for good, if something is; asked where the SDK's own loop is used.
    """
    import runpod
    from runpod.serverless.modules import rp_scale

    # Who asks for a job's status, rather than its stream, finds the whole answer there.
    config = {"handler": handler, "return_aggregate_stream": True, "concurrency_modifier": lambda _: concurrency}
    statuses: list[int] = []

    class Scaler:
        """What the SDK starts in the place of its `JobScaler`."""

        def __init__(self, _config: dict[str, Any]) -> None:
            pass

        def start(self) -> None:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                statuses.append(runner.run(self._run()))

        async def _run(self) -> int:
            async with Platform() as platform:
                return await run(platform)

    if not runpod.__version__.startswith(TESTED_VERSIONS):
        _log.warning("runpod %s is not a version that this worker was tested with", runpod.__version__)
    if (missing := missing_interface()) is None:
        rp_scale.JobScaler = Scaler
    else:
        _log.warning("The SDK's own loop is used, as runpod %s lacks what ours needs: %s", runpod.__version__, missing)
        threading.Thread(target=_end_with_engine, args=(failure,), name="watch the engine", daemon=True).start()
    runpod.serverless.start(config)
    return statuses[0] if statuses else 0


def _end_with_engine(failure: Callable[[], str | None]) -> None:
    """End the process when the engine has failed: the SDK's own loop would go on taking jobs and fail each of them."""
    reason = None
    while reason is None:
        time.sleep(_WATCH_S)
        try:
            reason = failure()
        except Exception as error:  # noqa: BLE001 (an engine that nobody can watch is not to be trusted with jobs)
            reason = f"the engine's state cannot be read: {described(error)}"
    _log.error("The worker has failed: %s", reason)
    time.sleep(_STOCK_GRACE_S)
    os._exit(1)
