"""Spirit's queue, through its SDK: the agent beside the worker gives out tasks and takes their answers.

The SDK's start, heartbeat, parsing of tasks and log are kept; its loop, `spirit_gpu.run`, is replaced by
`engine.queue.job_loop`. Where an SDK lacks what that needs, the SDK itself serves, in its proxy mode
(`engine.queue.spirit_proxy_mode`). Only the modules `spirit_*` of this package import the SDK.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Self

import uvloop

from engine.errors import DeliveryError, RefusedDeliveryError, UnusableQueueError, WorkerShutdownError
from engine.queue.bucket import Bucket
from engine.queue.protocol import Delivery
from engine.queue.spirit_agent import SpiritAgent, until_delivered
from engine.queue.spirit_answer import ProxiedDelivery
from engine.queue.spirit_delivery import HandlerDelivery
from engine.queue.spirit_sdk import Concurrency, log_through_sdk
from engine.queue.spirit_task import SpiritTask, read_task
from engine.run_clock import CLOCK

# Where the agent does not hold a take open: the pause between two calls, which the SDK makes while tasks come (without
# tasks it pauses for 0.25 s), and how long one take of ours asks.
IDLE_POLL_S = 0.05
_TAKE_S = 30.0
# How many tasks are remembered as answered; one that is given out again is only acknowledged.
_MAX_ANSWERED = 10_000
# How long the answers may take to tasks that came too late to be run.
_REFUSE_TIMEOUT_S = 1.0

_log = logging.getLogger(__name__)


class SpiritClient:
    """A `JobQueue` on one event loop: `async with SpiritClient(concurrency) as queue`.

    Args:
        concurrency: the SDK's, whose tasks its heartbeats name.
        request_timeout_s: how long a request may run while its client waits, in seconds.
        bucket: where results go that are too large for the platform, if there is one.
    """

    def __init__(
        self, concurrency: Concurrency, request_timeout_s: float = 170.0, bucket: Bucket | None = None
    ) -> None:
        from spirit_gpu.settings import HEADER_HEALTH, SETTINGS

        self._running = concurrency.current_jobs
        self._request_timeout_s = request_timeout_s
        self._bucket = bucket
        self._agent = SpiritAgent(SETTINGS.agent_url(), HEADER_HEALTH)
        self._tasks: dict[str, SpiritTask] = {}
        self._repeated: set[str] = set()
        self._answered: OrderedDict[str, None] = OrderedDict()
        self._gone: asyncio.Queue[str] = asyncio.Queue()
        self._polling_stopped = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Open the connections."""
        await self._agent.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Answer tasks that came too late to be run, and close the connections."""
        late = [task for name, task in self._tasks.items() if name not in self._running]
        with suppress(TimeoutError):
            async with asyncio.timeout(_REFUSE_TIMEOUT_S):
                await asyncio.gather(*(self._refuse(task) for task in late), return_exceptions=True)
        await self._agent.__aexit__(*exception)

    async def _refuse(self, task: SpiritTask) -> None:
        _log.warning("Job %s: answered with 503, as it came while the worker ended", task.id)
        error = WorkerShutdownError("the worker ends; try again")
        await self.delivery(task.id, CLOCK.now() + _REFUSE_TIMEOUT_S).finish(error)

    async def take(self, count: int) -> list[Any]:
        """Return one job, as an agent gives out one task at a time; none if none came for half a minute.

        Raises:
            UnusableQueueError: the agent is unhealthy and no job runs, as the SDK has it.
            Exception: as `SpiritAgent.take`.
        """
        del count
        self._polling_stopped.clear()
        until = CLOCK.now() + _TAKE_S
        while not self._polling_stopped.is_set():
            document, is_healthy = await self._agent.take()
            if document is not None and (job := self._job(read_task(document))):
                return [job]
            if not is_healthy and not self._tasks:
                raise UnusableQueueError("the platform's agent says that it is unhealthy (X-Agent-Health: false)")
            if CLOCK.now() >= until:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_POLL_S):
                    await self._polling_stopped.wait()
        return []

    def _job(self, task: SpiritTask) -> dict[str, Any] | None:
        """Return a task as a job; None for one that runs or has been answered here."""
        if task.id in self._tasks:
            if task.id not in self._repeated:
                self._repeated.add(task.id)
                _log.warning("Job %s: given out again while it runs; copies are ignored", task.id)
            return None
        if task.id in self._answered:
            _log.warning("Job %s: given out again after its answer; it is acknowledged again", task.id)
            self._agent.run_in_background(self._acknowledge(task.id))
            return None
        if task.id and task.id.isprintable():  # The loop refuses another.
            self._tasks[task.id] = task
        job = {"id": task.id, "input": task.input}
        if (enqueued_ms := task.header.enqueue_at) > 0:
            job["submitted_at_s"] = enqueued_ms / 1000
        return job

    async def _acknowledge(self, task_id: str) -> None:
        until = CLOCK.now() + _TAKE_S
        with suppress(DeliveryError, RefusedDeliveryError):
            await until_delivered(lambda: self._agent.call("request-ack", task_id, b""), lambda: until)

    def stop_polling(self) -> None:
        """Take nothing more; a task that is on its way still arrives."""
        self._polling_stopped.set()
        self._agent.stop_polling()

    def reconnect(self) -> None:
        """Do nothing: the agent is on the same machine, and its polls last seconds."""

    async def stop_signals(self) -> list[str]:
        """Return the id of a job whose client has gone, when there is one: the platform has no other stop signals."""
        return [await self._gone.get()]

    def delivery(self, job_id: str, deadline: float) -> Delivery:
        """Return the delivery of a task of the kind that this one is."""
        task = self._tasks[job_id]
        limit_s = None if task.is_async else self._request_timeout_s
        delivery: HandlerDelivery | ProxiedDelivery
        if task.is_proxied:
            delivery = ProxiedDelivery(self._agent, task, deadline, limit_s, self._gone.put_nowait)
        else:
            delivery = HandlerDelivery(self._agent, task, deadline, limit_s, self._bucket)
        delivery.on_answered = lambda: self._remember(job_id)
        return delivery

    def _remember(self, task_id: str) -> None:
        self._answered[task_id] = None
        if len(self._answered) > _MAX_ANSWERED:
            self._answered.popitem(last=False)

    def add_in_progress(self, job_id: str) -> None:
        """Name the task in each heartbeat from now on."""
        self._running.add(job_id)

    def remove_in_progress(self, job_id: str) -> None:
        """Stop naming the task."""
        self._running.discard(job_id)
        self._repeated.discard(job_id)
        self._tasks.pop(job_id, None)


def serve(
    run: Callable[[SpiritClient], Awaitable[int]],
    concurrency: Concurrency,
    request_timeout_s: float,
    bucket: Bucket | None = None,
) -> int:
    """Let the SDK start the worker, with `run` instead of its loop; return the exit status.

    Args:
        run: takes jobs from the queue until it is asked to stop; returns the exit status.
        concurrency: what `start_heartbeat` has returned.
        request_timeout_s: how long a request may run while its client waits, in seconds.
        bucket: where results go that are too large for the platform, if there is one.
    """
    import spirit_gpu

    statuses: list[int] = []

    async def run_own_loop(_handlers: dict[str, Any], _env: object) -> None:
        async with SpiritClient(concurrency, request_timeout_s, bucket) as queue:
            statuses.append(await run(queue))

    log_through_sdk()
    spirit_gpu.run = run_own_loop
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    spirit_gpu.start({"handler": run_own_loop})
    return statuses[0]
