"""RunPod's queue, through its SDK; only this file imports the SDK in the serving process.

The SDK's take, stop channel, ping and log are kept; its loop is replaced by `engine.queue.job_loop`. Where an SDK lacks
what that loop needs, the worker logs it and uses the SDK's own loop; the engine is watched in either case.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import uvloop

from engine.errors import DeliveryError, RateLimitedError, RefusedDeliveryError, safe_str
from engine.queue.bucket import Bucket
from engine.queue.delivery import JobDelivery
from engine.queue.http_client import HTTPClient
from engine.queue.protocol import POLL_CANCEL_GRACE_S, TAKE_TIMEOUT_S, Delivery, PostKind
from engine.queue.take_connector import TakeConnector
from engine.queue.take_response import TakeResponse
from engine.run_clock import CLOCK

TESTED_VERSIONS = ("1.12.",)
# Under the SDK's own loop: how often the engine is checked, and how long its jobs may take to end once it has failed.
_WATCH_INTERVAL_S = 0.5
_SDK_LOOP_GRACE_S = 3.0
_POST_TIMEOUT_S = 60.0
# How much of the body of a refusal is logged.
_MAX_ERROR_BODY_BYTES = 200
_RETRYABLE_STATUSES = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}

_log = logging.getLogger(__name__)


class _Connections:
    """Connections to the platform: one for takes, one for stop signals, and those of deliveries."""

    def __init__(self, headers: dict[str, str]) -> None:
        self._take_connector, self._stop_connector = TakeConnector(), TakeConnector()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        self.takes = aiohttp.ClientSession(
            connector=self._take_connector, headers=headers, timeout=timeout, response_class=TakeResponse
        )
        self.stops = aiohttp.ClientSession(connector=self._stop_connector, headers=headers, timeout=timeout)
        self.posts = HTTPClient(headers, _POST_TIMEOUT_S)

    def resume_taking(self) -> None:
        self._take_connector.polling = True

    def stop_taking(self) -> None:
        self._take_connector.stop_polling()

    async def retire(self) -> None:
        """Receive what is on its way, for a short time, then close all. Requests in progress fail."""
        self._take_connector.stop_polling()
        self._stop_connector.stop_polling()
        await asyncio.sleep(POLL_CANCEL_GRACE_S)
        await self.close()

    async def close(self) -> None:
        await self.takes.close()
        await self.stops.close()
        self.posts.close()


class RunPodClient:
    """A `JobQueue` on one event loop: `async with RunPodClient() as queue`.

    Args:
        bucket: where results go that are too large for the platform, if there is one.
    """

    def __init__(self, bucket: Bucket | None = None) -> None:
        from runpod.http_client import TooManyRequests, get_auth_header
        from runpod.serverless.modules import rp_http, rp_job
        from runpod.serverless.modules.worker_state import JobsProgress

        self._bucket = bucket
        self._sdk_job = rp_job
        self._rate_limited: type[Exception] = TooManyRequests
        self._in_progress = JobsProgress()
        self._headers = get_auth_header()
        self._urls = {PostKind.OUTPUT: rp_http.JOB_STREAM_URL, PostKind.RESULT: rp_http.JOB_DONE_URL}
        self._retiring: dict[asyncio.Task[None], _Connections] = {}

    async def __aenter__(self) -> Self:
        """Open the connections."""
        self._connections = _Connections(self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._connections.close()
        while self._retiring:
            task, connections = self._retiring.popitem()
            task.cancel()
            await connections.close()

    def reconnect(self) -> None:
        """Open new connections. The old ones are closed when what is on its way has had time to arrive."""
        old, self._connections = self._connections, _Connections(self._headers)
        task = asyncio.create_task(old.retire(), name="close old connections")
        self._retiring[task] = old
        task.add_done_callback(lambda ended: self._retiring.pop(ended, None))

    async def take(self, count: int) -> list[Any]:
        """Return up to `count` jobs, as `engine.queue.take_response` finds them in the response.

        Raises:
            RateLimitedError: the platform asks to wait.
            aiohttp.ClientError, OSError: it cannot be reached.
        """
        connections = self._connections
        connections.resume_taking()
        try:
            return await self._sdk_job.get_job(connections.takes, count) or []
        except self._rate_limited:
            raise RateLimitedError("the platform answered with status 429") from None

    def stop_polling(self) -> None:
        """Close the take's connection for writing only, so that a job that was already sent still arrives."""
        self._connections.stop_taking()

    async def stop_signals(self) -> list[str]:
        """Return the ids of jobs to stop.

        Raises:
            RateLimitedError: the platform asks to wait.
            aiohttp.ClientError, OSError: it cannot be reached.
        """
        poll = asyncio.create_task(self._sdk_job.get_stop_signals(self._connections.stops))
        try:
            await CLOCK.wait({poll}, TAKE_TIMEOUT_S)
            return list(poll.result()) if poll.done() else []
        except self._rate_limited:
            raise RateLimitedError("the platform answered with status 429") from None
        finally:
            poll.cancel()

    def delivery(self, job_id: str, deadline: float) -> Delivery:
        """Return the delivery of a job: each output as it comes, then all of them as the result."""
        return JobDelivery(self.post, job_id, deadline, self._bucket)

    async def post(self, kind: PostKind, job_id: str, body: bytes) -> None:
        """Deliver a JSON body for a job, in one attempt.

        Raises:
            RefusedDeliveryError: the platform does not accept it, and will not.
            DeliveryError: it did not arrive, or this cannot be known; another attempt may succeed.
        """
        quoted_id = quote(job_id, safe="")
        url = self._urls[kind].replace("$ID", quoted_id)
        url += f"&isStream={'true' if kind is PostKind.RESULT else 'false'}"
        headers = {"X-Request-ID": quoted_id, "Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8"}
        try:
            status, answer = await self._connections.posts.post(url, headers, body)
        except OSError as error:
            raise DeliveryError(safe_str(error)) from None
        if status < HTTPStatus.BAD_REQUEST:
            return
        # The error page of a gateway may be in any encoding.
        message = f"status {status}: {answer[:_MAX_ERROR_BODY_BYTES].decode(errors='replace')}"
        if status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in _RETRYABLE_STATUSES:
            raise RefusedDeliveryError(message, status)
        raise DeliveryError(message)

    def add_in_progress(self, job_id: str) -> None:
        """Report the job as in progress with each ping from now on."""
        self._in_progress.add(job_id)

    def remove_in_progress(self, job_id: str) -> None:
        """Stop reporting the job."""
        self._in_progress.remove(job_id)


def missing_interface() -> str | None:
    """Return what the SDK lacks of what the job loop needs; None if nothing is missing.

    The SDK itself is inspected: its version does not say what an upgrade has moved.
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
        return safe_str(error)
    return next((f"it does not hold that {what}" for what, is_so in checks.items() if not is_so), None)


def import_sdk() -> None:
    """Import the SDK, which takes about 1.5 seconds."""
    importlib.import_module("runpod.serverless.modules.rp_scale")


def serve(
    handler: Callable[..., Any],
    run: Callable[[RunPodClient], Awaitable[int]],
    concurrency: int,
    failure: Callable[[], str | None],
    bucket: Bucket | None = None,
) -> int:
    """Let the SDK start the worker, with `run` instead of its loop; return the exit status.

    Args:
        handler: an async generator of a job's outputs, as the SDK registers it.
        run: takes jobs from the queue until it is asked to stop; returns the exit status.
        concurrency: most jobs at once; used with the SDK's own loop.
        failure: returns what is wrong with the engine for good, or None; used with the SDK's own loop.
        bucket: where results go that are too large for the platform; not used with the SDK's own loop.
    """
    import runpod
    from runpod.serverless.modules import rp_scale

    # The aggregate is what `/status` returns for a job whose client did not read the stream.
    config = {"handler": handler, "return_aggregate_stream": True, "concurrency_modifier": lambda _: concurrency}
    statuses: list[int] = []

    class Scaler:
        """What the SDK starts instead of its `JobScaler`."""

        def __init__(self, _config: dict[str, Any]) -> None:
            pass

        def start(self) -> None:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                statuses.append(runner.run(self._run()))

        async def _run(self) -> int:
            async with RunPodClient(bucket) as queue:
                return await run(queue)

    if not runpod.__version__.startswith(TESTED_VERSIONS):
        _log.warning("runpod %s is not a version that this worker was tested with", runpod.__version__)
    if (missing := missing_interface()) is None:
        rp_scale.JobScaler = Scaler
    else:
        _log.warning("Using the SDK's own loop, as runpod %s lacks what ours needs: %s", runpod.__version__, missing)
        threading.Thread(target=_end_with_engine, args=(failure,), name="watch the engine", daemon=True).start()
    runpod.serverless.start(config)
    return statuses[0] if statuses else 0


def _end_with_engine(failure: Callable[[], str | None]) -> None:
    """End the process when the engine has failed: the SDK's own loop would take more jobs, and each would fail."""
    reason = None
    while reason is None:
        time.sleep(_WATCH_INTERVAL_S)
        try:
            reason = failure()
        except Exception as error:  # noqa: BLE001 (an engine that cannot be watched must not get jobs)
            reason = f"the engine's state cannot be read: {safe_str(error)}"
    _log.error("The worker has failed: %s", reason)
    time.sleep(_SDK_LOOP_GRACE_S)
    os._exit(1)
