"""The job loop: takes jobs as the engine has room for them, runs them, and ends without losing one.

    SERVING ──stop()──▶ DRAINING ──▶ ENDED, exit status 0
       └────fail()────▶ FAILED ────▶ ENDED, exit status 1

It waits for events and never polls on a timer: a job starts as soon as it was taken, and a free slot is filled at once.
At most one take is in flight.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from engine.cold_start import FINAL_PHASE, ColdStart
from engine.errors import (
    DeliveryError,
    EngineError,
    InternalError,
    JobError,
    RefusedOutputError,
    TimedOutError,
    UnusableQueueError,
    WorkerShutdownError,
    error_text,
    safe_str,
)
from engine.jobs import job_log
from engine.jobs.proxied import AnswerStart
from engine.queue.admission import Admission
from engine.queue.backoff import PollBackoff
from engine.queue.protocol import POLL_CANCEL_GRACE_S, TAKE_TIMEOUT_S, JobQueue
from engine.queue.running_job import JobState, RunningJob
from engine.run_clock import CLOCK
from engine.telemetry.costs import Costs
from engine.telemetry.counters import COUNTERS
from engine.telemetry.job_times import CURRENT, JobTimes, RequestStats

_WATCH_INTERVAL_S = 0.25
# How long the last deliveries may take when the worker ends, and after that, what is left of the jobs' tasks.
FINAL_DELIVERY_TIMEOUT_S = 8.0
ABANDON_TIMEOUT_S = 2.0
# How much of it the result that asks for another worker waits for the other results.
_REPLACEMENT_DELAY_S = 3.0

_log = logging.getLogger(__name__)

Handler = Callable[[dict[str, Any]], AsyncGenerator[Any, None]]


class LoopState(Enum):
    """What the loop is doing."""

    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"
    ENDED = "ended"


@dataclass(frozen=True)
class Timeouts:
    """How long things may take, in seconds in which the worker runs (`engine.run_clock`).

    Attributes:
        drain_s: jobs that run when the worker is asked to stop.
        delivery_s: from a job's start until its outputs are no longer delivered: the platform's execution timeout.
        execution_s: a job, after which it is aborted; None for no limit.
    """

    drain_s: float = 25.0
    delivery_s: float = 600.0
    execution_s: float | None = None


class JobLoop:
    """Runs jobs until it is asked to stop or the engine fails.

    Args:
        queue: where jobs come from and outputs go.
        handler: an async generator of a job's outputs.
        admission: says how many jobs to take now.
        load_changed: is set when the answer of `admission` may have changed; the loop clears it.
        failure: returns what is wrong with the engine for good, or None.
        timeouts: how long things may take.
        pop_request_stats: returns and forgets what the engine says of a job's requests that have finished.
        log_inputs: whether the log shows the inputs of jobs.
        cold_start: is marked when the first job was taken, and when its first output was there.
        costs: counts what each job costs.
        on_started: is called with the times of each job that starts.
        on_ended: is called with the times of each job that has ended.
    """

    def __init__(  # noqa: PLR0913 (all that it depends on, so that a test can replace each)
        self,
        queue: JobQueue,
        handler: Handler,
        admission: Admission,
        *,
        load_changed: asyncio.Event | None = None,
        failure: Callable[[], str | None] = lambda: None,
        timeouts: Timeouts | None = None,
        pop_request_stats: Callable[[str], list[RequestStats]] = lambda _: [],
        log_inputs: bool = False,
        cold_start: ColdStart | None = None,
        costs: Costs | None = None,
        on_started: Callable[[JobTimes], None] = lambda _: None,
        on_ended: Callable[[JobTimes], None] = lambda _: None,
    ) -> None:
        self._queue = queue
        self._handler = handler
        self._admission = admission
        self._changed = load_changed or asyncio.Event()
        self._failure = failure
        self._timeouts = timeouts or Timeouts()
        self._pop_request_stats = pop_request_stats
        self._log_inputs = log_inputs
        self._cold_start = cold_start
        self._costs = costs or Costs(CLOCK.now())
        self._on_started = on_started
        self._on_ended = on_ended
        self._cold_start_ended = "First output"
        self._thawed = asyncio.Event()
        self._jobs: dict[str, RunningJob] = {}
        self._supervised: set[asyncio.Task[None]] = set()
        self._ending = asyncio.Event()
        self._start_lock = asyncio.Lock()
        self._ending_since = 0.0
        self._failure_reason: str | None = None
        self._shutdown_error: WorkerShutdownError | None = None
        self.state = LoopState.SERVING

    def stop(self) -> None:
        """Take no further job, and end when the running ones have ended."""
        if self.state is LoopState.SERVING:
            self._begin_ending(LoopState.DRAINING)

    def fail(self, reason: str) -> None:
        """Take no further job, and end the running ones as retryable: the worker cannot serve any more."""
        if self.state in (LoopState.SERVING, LoopState.DRAINING):
            self._failure_reason = reason
            _log.error("The worker has failed: %s", reason)
            self._begin_ending(LoopState.FAILED)

    def on_thaw(self, frozen_s: float) -> None:
        """Go on after the process was frozen for so many seconds, on new connections: the old ones may be dead."""
        _log.info("Restored: the process did not run for %.1f s; %d jobs in progress", frozen_s, len(self._jobs))
        self._cold_start, self._cold_start_ended = ColdStart(time.monotonic()), "First output since the restore"
        self._thawed.set()
        if self.state is not LoopState.ENDED:
            self._queue.reconnect()

    def supervise(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task until the loop ends; if the task ends with an exception, the worker fails."""
        task = self._create_task(work, name)
        self._supervised.add(task)
        return task

    def _create_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("Task %r failed", task.get_name(), exc_info=error)
            self.fail(f"its task {task.get_name()!r} ended with {safe_str(error)}")

    def _begin_ending(self, state: LoopState) -> None:
        self.state = state
        COUNTERS.drains += state is LoopState.DRAINING
        self._ending_since = CLOCK.now()
        self._ending.set()
        # Before anything else is posted: a client may answer to that with another job, which would come here.
        self._queue.stop_polling()

    async def run(self) -> int:
        """Run until `stop` or `fail`; return the exit status: 0, or 1 if the worker has failed.

        If it is cancelled, it abandons the running jobs.
        """
        taking = self.supervise(self._take_jobs(), "take jobs")
        self.supervise(self._watch_stop_signals(), "watch for stop signals")
        self.supervise(self._watch_engine(), "watch the engine")
        try:
            await self._ending.wait()
            _log.info("Worker %s: %d jobs in progress", self.state.value, len(self._jobs))
            await self._end_jobs(taking)
        finally:
            await self._abandon_jobs()
        status = int(self.state is LoopState.FAILED)
        self.state = LoopState.ENDED
        return status

    # Taking jobs

    async def _take_jobs(self) -> None:
        backoff = PollBackoff()
        while not self._ending.is_set():
            self._changed.clear()
            self._thawed.clear()
            COUNTERS.slots = slots = self._admission.available_slots(len(self._jobs))
            if not slots:
                COUNTERS.full += 1
                await self._wait_or_shutdown(self._changed.wait())
                continue
            asked_at = CLOCK.now()
            try:
                COUNTERS.takes += 1
                with backoff.attempt("Polling for jobs failed"):
                    backoff.result = [job for job in await self._take(slots) if self._start_job(job, asked_at)]
                COUNTERS.failed_takes += backoff.has_failed
            except UnusableQueueError as error:
                self.fail(str(error))
            if backoff.wait_s:
                await self._wait_or_shutdown(self._wait_or_thaw(backoff.wait_s))

    async def _take(self, count: int) -> list[Any]:
        """Take up to `count` jobs. When the worker ends, stop polling without losing a job that is on its way."""
        take = asyncio.create_task(self._queue.take(count), name="take")
        try:
            await self._wait_or_shutdown(CLOCK.wait({take}, TAKE_TIMEOUT_S))
            if take.done():
                return take.result()
            self._queue.stop_polling()
            await CLOCK.wait({take}, POLL_CANCEL_GRACE_S)
        finally:
            take.cancel()
        await asyncio.wait({take})
        return [] if take.cancelled() or take.exception() else take.result()

    async def _wait_or_shutdown(self, event: Awaitable[object]) -> None:
        waits = {asyncio.ensure_future(event), asyncio.ensure_future(self._ending.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _wait_or_thaw(self, seconds: float) -> None:
        """Wait for so long after a failed poll; not if the worker was frozen meanwhile, which explains the failure."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._thawed.wait()

    def _start_job(self, job: Any, asked_at: float) -> bool:
        """Start a job, now or when its last run is over; return whether it is one that starts."""
        job_id = _job_id(job)
        if job_id is None:
            _log.error("Skipping a malformed job: a %s without an id", type(job).__name__)
            return False
        if self._shutdown_error is not None or self.state is LoopState.FAILED:
            # It was never reported as in progress: the platform gives it to another worker.
            _log.warning("Job %s: arrived too late to run here; it returns to the queue", job_id)
            return False
        if (last := self._jobs.get(job_id)) is not None:
            # The platform has the result of the last run, or has stopped it, and starts another one.
            if last.state is not JobState.RUNNING and last.redelivered_job is None:
                last.redelivered_job = job, asked_at
                return True
            if last.state is JobState.RUNNING and CLOCK.was_frozen_since(last.asked_at):
                # The platform took the worker for lost, and has dropped what this run had delivered.
                _log.warning("Job %s: given out again after the worker was frozen; it runs again", job_id)
                last.redelivered_job = job, asked_at
                last.abort(JobState.STOPPED)
                return True
            _log.warning("Job %s: redelivered while it runs; the duplicate is ignored", job_id)
            return False
        if self._cold_start is not None:
            self._cold_start.mark("first_take")
        times = JobTimes(job_id, submitted_at_s=job.get("submitted_at_s"))
        COUNTERS.jobs_taken += 1
        self._costs.begin(times)
        self._on_started(times)
        delivery = self._queue.delivery(job_id, times.taken_at + self._timeouts.delivery_s)
        running = RunningJob(job_id, delivery, times, asked_at)
        self._jobs[job_id] = running
        self._queue.add_in_progress(job_id)
        limits_s = [limit_s for limit_s in (self._timeouts.execution_s, delivery.time_limit_s) if limit_s is not None]
        if limits_s:
            running.timer = CLOCK.call_later(min(limits_s), partial(self._time_out, running, min(limits_s)))
        running.task = self._create_task(self._run_job(job, running), f"job {job_id}")
        job_log.log_started(job_id, job, with_input=self._log_inputs)
        return True

    # Running a job

    async def _run_job(self, job: dict[str, Any], running: RunningJob) -> None:
        running.has_run = True
        CURRENT.set(running.times)
        error = running.abort_error
        if running.state is JobState.RUNNING:
            error = await self._run_handler(job, running)
        if running.timer is not None:
            running.timer.cancel()
        try:
            if running.state is JobState.STOPPED:
                running.times.outcome = "stopped"
                await running.delivery.stopped()
            elif running.state is not JobState.ABANDONED:
                running.state = JobState.FINISHING
                reason = self._fail_if_engine_failed()
                if reason is not None:
                    error = WorkerShutdownError(f"the worker has failed: {reason}")
                replace = reason is not None and await self._wait_to_request_replacement(running)
                running.state = JobState.DELIVERING
                begun_at = CLOCK.now()
                running.times.outcome = await running.delivery.finish(error, replace_worker=replace)
                running.times.add_delivery(begun_at)
        finally:
            self._remove_job(job, running)

    async def _run_handler(self, job: dict[str, Any], running: RunningJob) -> JobError | None:
        """Run the handler; return the error that the job ends with, if it does not complete."""
        error: JobError | None
        try:
            error = await self._deliver_outputs(job, running)
        except asyncio.CancelledError:
            error = WorkerShutdownError("the job was cancelled in the worker; try again")
        except JobError as own_error:
            error = own_error
            if isinstance(error, RefusedOutputError) and CLOCK.was_frozen_since(running.asked_at):
                # It was given out again meanwhile. An error could end that run, if it is here: then it is accepted.
                _log.warning("Job %s: the platform took it back while the worker was frozen", running.id)
                running.state = JobState.STOPPED
        except DeliveryError as failure:
            error = EngineError(f"an output could not be delivered: {failure}")
        except Exception:  # noqa: BLE001 (whatever it is, it ends this job and no other)
            _log.exception("Job %s failed in the worker", running.id)
            error = InternalError("internal worker error; see the worker's log")
        # Whatever the handler made of its cancellation.
        return running.abort_error or error

    async def _deliver_outputs(self, job: dict[str, Any], running: RunningJob) -> JobError | None:
        """Deliver the handler's outputs as they come; return the error that it reports.

        The jobs of one take start one turn of the event loop after another. Started together, each would wait until
        the last of them is tokenized, and the engine with them.
        """
        async with self._start_lock:
            await asyncio.sleep(0)
        async with aclosing(self._handler(job)) as outputs:
            async for output in outputs:
                if running.state is not JobState.RUNNING:
                    break
                if not isinstance(output, AnswerStart):
                    if running.times.first_output_at is None:
                        running.times.first_output_at = CLOCK.now()
                    self._mark_first_output()
                if (text := error_text(output)) is not None:
                    return HandlerError(text)
                begun_at = CLOCK.now()
                await running.delivery.stream(output)
                running.times.add_delivery(begun_at)
        if running.state is not JobState.RUNNING:
            # The handler has suppressed its cancellation: it has not come to its own end, or goes on.
            raise asyncio.CancelledError
        return None

    async def _wait_to_request_replacement(self, running: RunningJob) -> bool:
        """Return whether this job's result asks for another worker: the oldest job's does, after all other results.

        The platform may end the worker at once when it is asked, and with it deliveries that are still under way.
        """
        candidates = (JobState.RUNNING, JobState.FINISHING)
        if running is not next(one for one in self._jobs.values() if one.state in candidates):
            return False
        others = [task for task in self._tasks() if task is not running.task]
        if others:
            await CLOCK.wait(others, self._ending_since + _REPLACEMENT_DELAY_S - CLOCK.now())
        return True

    def _remove_job(self, job: dict[str, Any], running: RunningJob) -> None:
        del self._jobs[running.id]
        self._queue.remove_in_progress(running.id)
        self._changed.set()
        times = running.times
        times.ended_at = CLOCK.now()
        COUNTERS.lost += times.outcome == "undelivered"
        try:
            times.requests += self._pop_request_stats(running.id)
            self._costs.end(times)
            job_log.log_ended(job, times, self._costs.document(times), running.delivery.delivered_count)
            self._on_ended(times)
        except Exception:  # noqa: BLE001 (a line of the log is not worth the worker)
            _log.exception("Job %s: its end could not be logged", running.id)
        if running.redelivered_job is not None:
            self._start_job(*running.redelivered_job)

    def _mark_first_output(self) -> None:
        """Note the worker's first output since it was started or restored."""
        cold_start, self._cold_start = self._cold_start, None
        if cold_start is not None:
            cold_start.mark(FINAL_PHASE)
            cold_start.log(self._cold_start_ended)

    # Aborting jobs

    async def _watch_stop_signals(self) -> None:
        backoff = PollBackoff()
        while True:
            with backoff.attempt("Polling for stop signals failed"):
                backoff.result = job_ids = await self._queue.stop_signals()
                for job_id in job_ids:
                    self._stop_job(job_id)
            await asyncio.sleep(backoff.wait_s)

    def _stop_job(self, job_id: str) -> None:
        running = self._jobs.get(job_id)
        if running is not None:
            running.redelivered_job = None
        if running is not None and running.state is JobState.RUNNING:
            running.abort(JobState.STOPPED)

    @staticmethod
    def _time_out(running: RunningJob, limit_s: float) -> None:
        if running.state is JobState.RUNNING:
            running.abort(JobState.FINISHING, TimedOutError(limit_s))

    async def _watch_engine(self) -> None:
        while self._fail_if_engine_failed() is None:  # noqa: ASYNC110 (vLLM sends no event for this, least of all for a stall)
            await asyncio.sleep(_WATCH_INTERVAL_S)

    def _fail_if_engine_failed(self) -> str | None:
        """Return what is wrong with the worker for good; if something is, end the loop.

        The answer stays: a stalled engine has no unfinished request any more once its jobs are aborted.
        """
        if self._failure_reason is None:
            try:
                reason = self._failure()
            except Exception as error:  # noqa: BLE001 (an engine that cannot be watched must not get jobs)
                reason = f"the engine's state cannot be read: {safe_str(error)}"
            if reason is not None:
                self.fail(reason)
        return self._failure_reason

    # Ending

    @property
    def _drain_deadline(self) -> float:
        """When the running jobs are aborted, by `engine.run_clock`."""
        return self._ending_since + (self._timeouts.drain_s if self.state is LoopState.DRAINING else 0.0)

    async def _end_jobs(self, taking: asyncio.Task[None]) -> None:
        """Let jobs that run, or are still on their way, use the drain time; then end all of them as retryable."""
        while self._unfinished(taking) and (left_s := self._drain_deadline - CLOCK.now()) > 0:
            await asyncio.wait(self._unfinished(taking), timeout=min(left_s, _WATCH_INTERVAL_S))
        why = "the worker has failed" if self.state is LoopState.FAILED else "the worker was asked to stop"
        self._shutdown_error = WorkerShutdownError(f"{why} before the job had ended; try again")
        for running in self._jobs.values():
            if running.state is JobState.RUNNING:
                running.abort(JobState.FINISHING, self._shutdown_error)
        deadline = CLOCK.now() + FINAL_DELIVERY_TIMEOUT_S
        while (unfinished := self._unfinished(taking)) and (left_s := deadline - CLOCK.now()) > 0:
            await asyncio.wait(unfinished, timeout=left_s)

    def _unfinished(self, taking: asyncio.Task[None]) -> list[asyncio.Task[None]]:
        return [task for task in (taking, *self._tasks()) if not task.done()]

    async def _abandon_jobs(self) -> None:
        """Cancel all tasks: a job that has not ended by now gets no result from this worker."""
        for running in self._jobs.values():
            _log.error("Job %s: the worker ends before the result could be delivered", running.id)
            running.redelivered_job = None
            running.abort(JobState.ABANDONED)
        for task in self._supervised:
            task.cancel()
        await CLOCK.wait([*self._supervised, *self._tasks()], ABANDON_TIMEOUT_S)

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [running.task for running in self._jobs.values() if running.task is not None]


def _job_id(job: Any) -> str | None:
    """Return the id of a job; None if this is not a job, or has no usable id."""
    value = job.get("id") if isinstance(job, dict) else None
    text = str(value) if isinstance(value, str | int) else ""
    return text if text and text.isprintable() else None


class HandlerError(JobError):
    """The error that the handler has yielded, passed on as it is."""

    def output(self) -> dict[str, str]:
        """Return the job output that ends the job as failed."""
        return {"error": str(self)}
