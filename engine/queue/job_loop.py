"""The worker's loop: takes jobs as the engine has room for them, runs them, and ends without losing one.

    SERVING ──stop()──▶ DRAINING ──▶ ENDED, exit status 0
       └────fail()────▶ FAILED ────▶ ENDED, exit status 1

It sleeps on events and never polls: a taken job starts at once, a freed slot is asked for at once. At most one take is
under way.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from engine.cold_start import LAST, ColdStart
from engine.errors import (
    BusyError,
    DeliveryError,
    EngineError,
    InternalError,
    JobError,
    StoppedError,
    TimedOutError,
    described,
    error_text,
)
from engine.queue.admission import Admission
from engine.queue.delivery import JobDelivery
from engine.queue.runpod_client import LET_GO_S, TAKE_TIMEOUT_S, Delivery

# The SDK waits so long when the platform says 429.
BUSY_WAIT_S = 5.0
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 5.0
_LONGEST_IDLE_WAIT_S = 1.0
# A call that the platform did not hold open says nothing about the next one: without a pause we would spin.
_HELD_S = 0.5
_WATCH_S = 0.25
# What the ends of jobs may take when the worker itself ends, and what is left of their tasks then.
LAST_WORDS_S = 8.0
GIVE_UP_S = 2.0
# How much of it the last job grants to the others.
_OTHERS_S = 3.0
# In characters; every route of vLLM is much shorter.
_LONGEST_ROUTE = 100

_log = logging.getLogger(__name__)

Handler = Callable[[dict[str, Any]], AsyncGenerator[Any, None]]


class Platform(Protocol):
    """What the loop needs of the platform; `engine.queue.runpod_client.Platform` has it."""

    async def take(self, count: int) -> list[Any]: ...  # noqa: D102 (see there)

    def let_go(self) -> None: ...  # noqa: D102

    async def stops(self) -> list[str]: ...  # noqa: D102

    async def post(self, kind: Delivery, job_id: str, body: bytes) -> None: ...  # noqa: D102

    def hold(self, job_id: str) -> None: ...  # noqa: D102

    def release(self, job_id: str) -> None: ...  # noqa: D102


class State(Enum):
    """What the loop is doing."""

    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"
    ENDED = "ended"


@dataclass(eq=False)
class _Held:
    """A job that is held, its task, and why it was cancelled, if it was.

    `ending` is set once its end is decided: from then on it is not cancelled any more. `again` is the same job, if it
    was given out anew since then: as soon as this run is over, it is run.
    """

    id: str
    begun: float
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    started: bool = False
    ending: bool = False
    stopped: bool = False
    ended_with: JobError | None = None
    first_output_s: float | None = None
    outcome: str = "completed"
    again: dict[str, Any] | None = None

    def cancel(self) -> None:
        """Break the run off, for the reason that was set before.

        A task that is cancelled before its first turn never has one: it would not even let go of the job.
        """
        self.ending = True
        if self.task is not None and self.started:
            self.task.cancel()


@dataclass(frozen=True)
class Timeouts:
    """How long things may take, in seconds.

    Args:
        drain_s: jobs that run when the worker is told to stop.
        job_s: one job, deliveries included: the platform's executionTimeout.
        run_s: one job, after which it is broken off; None for as long as it likes.
    """

    drain_s: float = 25.0
    job_s: float = 600.0
    run_s: float | None = None


class JobLoop:
    """Runs jobs until it is told to stop, or the engine fails.

    Args:
        platform: where jobs come from and outputs go.
        handler: an async generator of a job's outputs.
        admission: how many jobs to take now; `wake` tells that its answer may have changed.
        failure: what is wrong with the engine for good, if something is.
        timeouts: how long things may take.
        tokens_of: tokens in and out of a job that has ended, if the engine has told.
        log_inputs: whether the log shows what jobs ask.
        start: is told when the first job has been taken, and when its first output is there.
    """

    def __init__(  # noqa: PLR0913 (all that it acts on, so that a test can put its own in place)
        self,
        platform: Platform,
        handler: Handler,
        admission: Admission,
        *,
        failure: Callable[[], str | None] = lambda: None,
        timeouts: Timeouts | None = None,
        tokens_of: Callable[[str], tuple[int, int] | None] = lambda _: None,
        log_inputs: bool = False,
        start: ColdStart | None = None,
    ) -> None:
        self._platform = platform
        self._handler = handler
        self._admission = admission
        self._failure = failure
        self._timeouts = timeouts or Timeouts()
        self._tokens_of = tokens_of
        self._log_inputs = log_inputs
        self._start = start
        self._jobs: dict[str, _Held] = {}
        self._supervised: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._ending = asyncio.Event()
        self._turn = asyncio.Lock()
        self._ended_at = 0.0
        self._reason: str | None = None
        self._over: StoppedError | None = None
        self.state = State.SERVING

    def wake(self) -> None:
        """The engine's load has changed: look again how many jobs to take."""
        self._changed.set()

    def stop(self) -> None:
        """Take no further job; end when those that are held have ended."""
        if self.state is State.SERVING:
            self._end(State.DRAINING)

    def fail(self, reason: str) -> None:
        """The worker cannot serve any more: take no further job, end those that are held as retryable."""
        if self.state in (State.SERVING, State.DRAINING):
            self._reason = reason
            _log.error("The worker has failed: %s", reason)
            self._end(State.FAILED)

    def supervise(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task beside the jobs until the loop ends; if it ends with an exception, so does the worker."""
        task = self._task(work, name)
        self._supervised.add(task)
        return task

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task whose exception the worker does not outlive: what it was there for would not be done any more."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("Task %r failed", task.get_name(), exc_info=error)
            self.fail(f"its task {task.get_name()!r} ended with {described(error)}")

    def _end(self, state: State) -> None:
        self.state = state
        self._ended_at = time.monotonic()
        self._ending.set()
        # In this very turn: what is posted next may be what makes a client send another job.
        self._platform.let_go()

    async def run(self) -> int:
        """Run until `stop` or `fail`; return the exit status: 0, or 1 if the worker has failed.

        Cancelled, it gives up the jobs that it holds.
        """
        taking = self.supervise(self._take_jobs(), "take jobs")
        self.supervise(self._watch_stops(), "watch for jobs to stop")
        self.supervise(self._watch_engine(), "watch the engine")
        try:
            await self._ending.wait()
            _log.info("Worker %s: %d jobs held", self.state.value, len(self._jobs))
            await self._end_jobs(taking)
        finally:
            await self._leave_no_task()
        status = int(self.state is State.FAILED)
        self.state = State.ENDED
        return status

    # Taking jobs.

    async def _take_jobs(self) -> None:
        pace = _Pace()
        while not self._ending.is_set():
            self._changed.clear()
            room = self._admission.room(len(self._jobs))
            if not room:
                await self._either(self._changed.wait())
                continue
            with pace.call("Jobs could not be taken"):
                pace.found = [job for job in await self._take(room) if self._begin(job)]
            if pace.wait_s:
                await self._either(asyncio.sleep(pace.wait_s))

    async def _take(self, count: int) -> list[Any]:
        """Take up to `count` jobs; let go when the worker ends, without losing a job that may be on its way."""
        take = asyncio.create_task(self._platform.take(count), name="take")
        try:
            await self._either(asyncio.wait({take}, timeout=TAKE_TIMEOUT_S))
            if take.done():
                return take.result()
            self._platform.let_go()
            await asyncio.wait({take}, timeout=LET_GO_S)
        finally:
            take.cancel()
        await asyncio.wait({take})
        return [] if take.cancelled() or take.exception() else take.result()

    async def _either(self, this: Awaitable[object]) -> None:
        """Wait for this, or for the worker's end."""
        waits = {asyncio.ensure_future(this), asyncio.ensure_future(self._ending.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _begin(self, job: Any) -> bool:
        """Begin a job, now or when its last run is over; say whether it is one to begin."""
        job_id = _id(job)
        if job_id is None:
            _log.error("A %s without an id was taken in the place of a job; it is skipped", type(job).__name__)
            return False
        if self._over is not None or self.state is State.FAILED:
            # Never held: the platform gives it out again, and its client does not see it fail.
            _log.warning("Job %s: came too late to be run here; it goes back to the queue", job_id)
            return False
        if (last := self._jobs.get(job_id)) is not None:
            # A platform that has had the last run's end, or has stopped it, gives the job out for another one.
            if last.ending and last.again is None:
                last.again = job
                return True
            _log.warning("Job %s was delivered again while it runs; it is not run twice", job_id)
            return False
        if self._start is not None:
            self._start.ended("first_take")
        held = _Held(job_id, time.monotonic())
        self._jobs[job_id] = held
        self._platform.hold(job_id)
        if self._timeouts.run_s is not None:
            held.timer = asyncio.get_running_loop().call_later(self._timeouts.run_s, self._time_out, held)
        held.task = self._task(self._run(job, held), f"job {job_id}")
        line = {"job": job_id, **_batch(job), "route": _route(job), "status": "started"}
        try:
            _log.info("%s", json.dumps(line | {"input": job.get("input")} if self._log_inputs else line))
        except RecursionError:  # An input could just be read that cannot be written.
            _log.info("%s", json.dumps(line | {"input": "nested too deeply"}))
        return True

    # Running a job.

    async def _run(self, job: dict[str, Any], held: _Held) -> None:
        delivery = JobDelivery(self._platform.post, held.id, held.begun + self._timeouts.job_s)
        error: JobError | None
        held.started = True
        try:
            error = held.ended_with if held.ending else await self._outputs(job, held, delivery)
        except asyncio.CancelledError:
            error = held.ended_with or StoppedError("the job was broken off in the worker; try again")
        except JobError as refused:
            error = refused
        except DeliveryError as failure:
            error = EngineError(f"an output could not be delivered: {failure}")
        except Exception:  # noqa: BLE001 (whatever it is, it ends this job and no other)
            _log.exception("Job %s failed in the worker", held.id)
            error = InternalError("the worker failed; its log says why")
        held.ending = True
        if held.timer is not None:
            held.timer.cancel()
        try:
            if held.stopped:
                held.outcome = "stopped"
            else:
                reason = self._failed()
                if reason is not None:
                    error = StoppedError(f"the worker has failed: {reason}")
                replace = reason is not None and await self._is_left_alone(held)
                held.outcome = await delivery.finish(error, replace_worker=replace)
        finally:
            del self._jobs[held.id]
            self._platform.release(held.id)
            self._changed.set()
            self._log_end(job, held, delivery.count)
            if held.again is not None:
                self._begin(held.again)

    async def _is_left_alone(self, held: _Held) -> bool:
        """Whether this job's result is to ask for another worker: the oldest job's, when the others have theirs.

        A platform may end the worker at that word, and with it what has not been delivered yet.
        """
        if held is not next(one for one in self._jobs.values() if not one.stopped):
            return False
        others = [task for task in self._tasks() if task is not held.task]
        if others:
            await asyncio.wait(others, timeout=max(self._ended_at + _OTHERS_S - time.monotonic(), 0))
        return True

    async def _outputs(self, job: dict[str, Any], held: _Held, delivery: JobDelivery) -> JobError | None:
        """Deliver a job's outputs as they come; return the error that it ends with.

        The jobs of one take begin a turn of the event loop apart: side by side, each would wait until the last of them
        is prepared, and the engine with them.
        """
        async with self._turn:
            await asyncio.sleep(0)
        async with aclosing(self._handler(job)) as outputs:
            async for output in outputs:
                if held.ending:
                    break
                if held.first_output_s is None:
                    held.first_output_s = time.monotonic() - held.begun
                    self._first_output()
                if (text := error_text(output)) is not None:
                    return _ToldError(text)
                await delivery.stream(output)
        if held.ending:
            # The handler has kept its cancellation to itself: it has not run to its end, or runs on.
            raise asyncio.CancelledError
        return None

    def _first_output(self) -> None:
        """A job has its first output; the first of all ends the worker's start."""
        start, self._start = self._start, None
        if start is not None:
            start.ended(LAST)
            start.log("First output")

    def _log_end(self, job: dict[str, Any], held: _Held, batches: int) -> None:
        tokens = self._tokens_of(held.id)
        line = {
            "job": held.id,
            **_batch(job),
            "route": _route(job),
            "status": held.outcome,
            "tokens_in": tokens[0] if tokens else None,
            "tokens_out": tokens[1] if tokens else None,
            "first_output_s": None if held.first_output_s is None else round(held.first_output_s, 4),
            "duration_s": round(time.monotonic() - held.begun, 4),
            "batches": batches,
        }
        _log.info("%s", json.dumps(line))

    # What comes from outside.

    async def _watch_stops(self) -> None:
        pace = _Pace()
        while True:
            with pace.call("Stop signals could not be asked for"):
                pace.found = job_ids = await self._platform.stops()
                for job_id in job_ids:
                    self._stop_job(job_id)
            await asyncio.sleep(pace.wait_s)

    def _stop_job(self, job_id: str) -> None:
        held = self._jobs.get(job_id)
        if held is not None:
            held.again = None
        if held is not None and not held.ending:
            held.stopped = True
            held.cancel()

    def _time_out(self, held: _Held) -> None:
        """Break off a job that has run for as long as it may."""
        if not held.ending:
            held.ended_with = TimedOutError(self._timeouts.run_s or 0.0)
            held.cancel()

    async def _watch_engine(self) -> None:
        while self._failed() is None:  # noqa: ASYNC110 (vLLM tells nobody, and a stall least of all)
            await asyncio.sleep(_WATCH_S)

    def _failed(self) -> str | None:
        """What is wrong with the worker for good; if something is, the loop ends.

        It stays wrong: an engine that hangs has no request left to hang on once its jobs are broken off.
        """
        if self._reason is None:
            try:
                reason = self._failure()
            except Exception as error:  # noqa: BLE001 (an engine that nobody can watch is not to be trusted with jobs)
                reason = f"the engine's state cannot be read: {described(error)}"
            if reason is not None:
                self.fail(reason)
        return self._reason

    @property
    def _deadline(self) -> float:
        """When the jobs that are held as the worker ends are broken off."""
        return self._ended_at + (self._timeouts.drain_s if self.state is State.DRAINING else 0.0)

    async def _end_jobs(self, taking: asyncio.Task[None]) -> None:
        """Wait for jobs that are held, or still on their way, as long as they may take; then end all as retryable."""
        while self._pending(taking) and (left_s := self._deadline - time.monotonic()) > 0:
            await asyncio.wait(self._pending(taking), timeout=min(left_s, _WATCH_S))
        why = "the worker has failed" if self.state is State.FAILED else "the worker was told to stop"
        self._over = StoppedError(f"{why} before the job had ended; try again")
        for held in self._jobs.values():
            if not held.ending:
                held.ended_with = self._over
                held.cancel()
        over_at = time.monotonic() + LAST_WORDS_S
        while (pending := self._pending(taking)) and (left_s := over_at - time.monotonic()) > 0:
            await asyncio.wait(pending, timeout=left_s)

    def _pending(self, taking: asyncio.Task[None]) -> list[asyncio.Task[None]]:
        return [task for task in (taking, *self._tasks()) if not task.done()]

    async def _leave_no_task(self) -> None:
        """Cancel what still runs: a job that has not ended by now is given up."""
        for held in self._jobs.values():
            _log.error("Job %s: the worker ends before its end could be delivered", held.id)
            held.stopped, held.again = True, None
            held.cancel()
        for task in self._supervised:
            task.cancel()
        await asyncio.wait([*self._supervised, *self._tasks()], timeout=GIVE_UP_S)

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [held.task for held in self._jobs.values() if held.task is not None]


def _id(job: Any) -> str | None:
    """The id of what was taken in the place of a job, if it is a job that has one."""
    value = job.get("id") if isinstance(job, dict) else None
    text = str(value) if isinstance(value, str | int) else ""
    return text if text and text.isprintable() else None


def _batch(job: dict[str, Any]) -> dict[str, str]:
    """The `batchId` that the platform gives to the jobs of a batch, for the log."""
    batch = job.get("batchId")
    return {"batchId": batch} if isinstance(batch, str) and batch else {}


def _route(job: dict[str, Any]) -> str | None:
    """The route that a job calls; what is no plain route is the client's own words, which no log shows."""
    value = job.get("input")
    route = value.get("openai_route", value.get("route", "native")) if isinstance(value, dict) else None
    path = route.partition("?")[0] if isinstance(route, str) else None
    return path if path is not None and len(path) <= _LONGEST_ROUTE else None


class _Pace:
    """Keeps a long poll from spinning: after a call that failed or was not held, wait, longer and longer.

    `found` is what the call brought; `wait_s` is how long to wait before the next one.
    """

    def __init__(self) -> None:
        self.found: Sequence[object] = ()
        self.wait_s = 0.0
        self._next_s = _FIRST_WAIT_S

    @contextmanager
    def call(self, failure: str) -> Iterator[None]:
        """Around one call; an error of it is logged as a `failure`."""
        begun = time.monotonic()
        self.found, self.wait_s = (), 0.0
        longest_s = _LONGEST_IDLE_WAIT_S
        try:
            yield
        except BusyError as error:
            _log.warning("%s: %s; next attempt in %.0f s", failure, error, BUSY_WAIT_S)
            self.wait_s = BUSY_WAIT_S
            return
        except Exception as error:  # noqa: BLE001 (whatever it is, the next call may succeed)
            _log.warning("%s: %s", failure, described(error))
            longest_s = _LONGEST_WAIT_S
        else:
            if self.found or time.monotonic() - begun > _HELD_S:
                self._next_s = _FIRST_WAIT_S
                return
        self.wait_s = min(self._next_s, longest_s) * random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
        self._next_s = min(2 * self._next_s, _LONGEST_WAIT_S)


class _ToldError(JobError):
    """The error that the handler has yielded, as it is."""

    def output(self) -> dict[str, str]:
        return {"error": str(self)}
