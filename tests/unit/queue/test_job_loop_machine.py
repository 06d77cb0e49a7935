"""The loop as a state machine, in virtual time, against a platform that keeps account.

Whatever the order of jobs, stops, faults and ends: no job runs twice at once, each one that was taken has an end, and
when the loop has ended it leaves no task behind.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from engine.queue.admission import Admission
from engine.queue.job_loop import ABANDON_TIMEOUT_S, FINAL_DELIVERY_TIMEOUT_S, JobLoop, LoopState, Timeouts
from tests import virtual_time
from tests.fake_job_queue import FINE, POLL_FATES, POST_FATES, Fate, Ledger
from tests.unit.queue.test_admission import Load

T = TypeVar("T")
LIMIT = 3
DRAIN_S = 20.0
MOST_S = DRAIN_S + FINAL_DELIVERY_TIMEOUT_S + ABANDON_TIMEOUT_S + 1
"""The loop's end takes no longer."""
SLOW_CLOSE_S = 6.0
"""Closing a job takes so long at most: less than the loop grants."""
KINDS = ["quick", "slow", "endless", "raises", "error", "stubborn", "gives in", "slow to close", "cancels itself"]
"""How a job goes on after its first word."""
SELDOM = st.sampled_from([False, False, True])
"""What ends the loop: one that has ended has little more to show."""


def some(of: list[T]) -> st.SearchStrategy[list[T]]:
    return st.lists(st.sampled_from(of), min_size=1, max_size=3)


class Errors(logging.Handler):
    """What the log says of ends that were not heard."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def tell_of(self, job_id: str) -> bool:
        return any(line.startswith(f"Job {job_id}: ") for line in self.lines)

    def returned(self, job_id: str) -> bool:
        """Whether it came when the worker could not run it any more, and went back to the queue."""
        return any(line.startswith(f"Job {job_id}: arrived too late") for line in self.lines)


class LoopMachine(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.runner = self.stack.enter_context(virtual_time.runner())
        self.errors = Errors()
        logging.getLogger("engine").addHandler(self.errors)
        self.stack.callback(logging.getLogger("engine").removeHandler, self.errors)
        self.load = Load()
        self.kinds: dict[str, str] = {}
        self.running: list[str] = []
        self.dead: str | None = None
        self.unreadable = False
        self.ended_at: float | None = None
        self.cancelled = False
        # What the exit status may be.
        self.statuses = {0}
        self.ledger = Ledger(lambda: self.loop.state is LoopState.SERVING)
        self.load_changed = asyncio.Event()
        self.loop = JobLoop(
            self.ledger,
            self.work,
            Admission(self.load, LIMIT, 1200),
            load_changed=self.load_changed,
            failure=self.failure,
            timeouts=Timeouts(drain_s=DRAIN_S, delivery_s=100),
        )
        loop = self.runner.get_loop()
        # A task that failed and that nobody asked is a promise broken too.
        loop.set_exception_handler(lambda _, context: self.ledger.broken.append(str(context)))
        self.task = loop.create_task(self.loop.run())

    def failure(self) -> str | None:
        if self.unreadable:
            raise AttributeError("no such attribute")
        return self.dead

    async def work(self, job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Say "a" and "b", or not, by the job's kind."""
        self.running.append(job["id"])
        try:
            yield "a"
            match job["input"]:
                case "slow":
                    await asyncio.sleep(2)
                case "endless" | "slow to close":
                    await asyncio.Event().wait()
                case "raises":
                    raise RuntimeError("a bug")
                case "error":
                    yield {"error": "{}"}
                case "stubborn":
                    with suppress(asyncio.CancelledError):
                        await asyncio.sleep(2)
                case "gives in":
                    try:
                        await asyncio.sleep(2)
                    except asyncio.CancelledError:
                        return
                case "cancels itself":
                    raise asyncio.CancelledError
            yield "b"
        finally:
            try:
                if job["input"] == "slow to close":
                    await asyncio.sleep(SLOW_CLOSE_S)
            finally:
                self.running.remove(job["id"])

    # What can happen.

    @initialize(
        target=jobs, kinds=some(KINDS), takes=some([FINE, *POLL_FATES]), seconds=st.sampled_from([0.0, 0.01, 1.0])
    )
    def begin(self, kinds: list[str], takes: list[Fate], seconds: float) -> MultipleResults[str]:
        self.ledger.takes.extend(takes)
        submitted = self.submit(kinds)
        self.time_passes(seconds)
        return submitted

    @rule(target=jobs, kinds=some(KINDS))
    def submit(self, kinds: list[str]) -> MultipleResults[str]:
        return multiple(*(self._submit(kind) for kind in kinds))

    def _submit(self, kind: str) -> str:
        job_id = str(len(self.kinds))
        self.kinds[job_id] = kind
        self.submit_again(job_id)
        return job_id

    @rule(job_id=jobs)
    def submit_again(self, job_id: str) -> None:
        self.ledger.submit({"id": job_id, "input": self.kinds[job_id]})

    @rule(job_id=jobs)
    def stop_a_job(self, job_id: str) -> None:
        self.ledger.stop(job_id)

    @rule(job_id=jobs)
    def a_client_stops_a_job_and_retries_it(self, job_id: str) -> None:
        self.ledger.stop(job_id)
        # The loop hears of it, and closes the run: while it does, the job comes anew.
        self.time_passes(0.01)
        self.submit_again(job_id)

    @rule(fates=some(POLL_FATES))
    def the_next_takes_meet(self, fates: list[Fate]) -> None:
        self.ledger.takes.extend(fates)

    @rule(fates=some(POLL_FATES))
    def the_next_polls_for_stops_meet(self, fates: list[Fate]) -> None:
        self.ledger.polls.extend(fates)

    @rule(fates=some(POST_FATES))
    def the_next_posts_meet(self, fates: list[Fate]) -> None:
        self.ledger.posts.extend(fates)

    @rule(down=st.booleans())
    def the_network_changes(self, down: bool) -> None:
        self.ledger.down = down

    @rule(running=st.integers(0, 3), waiting=st.integers(0, 2), usage=st.floats(0, 1))
    def the_load_changes(self, running: int, waiting: int, usage: float) -> None:
        self.load.running, self.load.waiting, self.load.kv_cache_usage = running, waiting, usage
        self.load_changed.set()

    @rule(count=st.integers(1, 8))
    def turns_pass(self, count: int) -> None:
        async def turns() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.runner.run(turns())

    @rule(seconds=st.sampled_from([0.01, 0.3, 3.0, 3.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))

    @rule()
    def ten_seconds_without_faults_pass(self) -> None:
        for fates in (self.ledger.takes, self.ledger.polls, self.ledger.posts):
            fates.clear()
        self.ledger.down = False
        self.time_passes(10.0)
        # No pause is longer, and a loop that holds nothing has room.
        assert self.ledger.held or not self.ledger.waiting or self.ended_at is not None

    # What ends the loop.

    @rule(really=SELDOM)
    def stop(self, really: bool) -> None:
        if really:
            self._ends()
            self.loop.stop()

    @rule(really=SELDOM)
    def the_engine_dies(self, really: bool) -> None:
        if really:
            self._ends()
            self.dead = "its process is dead"
            if self._undecided():
                # Without a job the end may come sooner than the word of its death.
                self.statuses = {1} if self.running else {1, *self.statuses}

    @rule(really=SELDOM)
    def the_engine_cannot_be_watched_any_more(self, really: bool) -> None:
        if really:
            self.the_engine_dies(really=True)
            self.unreadable = True

    @rule(really=SELDOM)
    def admission_raises(self, really: bool) -> None:
        if really and self.ended_at is None:
            usage, self.load.kv_cache_usage = self.load.kv_cache_usage, None  # type: ignore[assignment]
            self.load.waiting = 0
            self.load_changed.set()
            self.time_passes(0.01)
            # While a take is under way, and while none is held, it is not asked for this.
            self.load.kv_cache_usage = usage
            if self.loop.state is not LoopState.SERVING:
                self._ends()
                self.statuses = {1}

    @rule(really=SELDOM)
    def somebody_tells_of_failure(self, really: bool) -> None:
        if really:
            self._ends()
            if self._undecided():
                self.statuses = {1}
            self.loop.fail("somebody says so")

    # Once: who cancels again does not want to wait for what is left.
    @precondition(lambda self: not self.cancelled)
    @rule(really=SELDOM)
    def cancel(self, really: bool) -> None:
        if really:
            self._ends()
            self.cancelled = self.task.cancel()

    def _ends(self) -> None:
        if self.ended_at is None:
            self.ended_at = time.monotonic()

    def _undecided(self) -> bool:
        return self.loop.state in (LoopState.SERVING, LoopState.DRAINING)

    # What always holds.

    @invariant()
    def all_promises_are_kept(self) -> None:
        # What is on its way to a loop that is cancelled, which is not how a worker ends, is the platform's to rescue.
        excused = {"a take was cancelled as it brought jobs"} if self.cancelled else set()
        assert set(self.ledger.broken) <= excused
        assert len(set(self.running)) == len(self.running), "a job runs twice at once"
        assert set(self.running) <= self.ledger.held
        assert len(self.ledger.held) <= LIMIT

    def teardown(self) -> None:
        """End the loop if nothing else has, and see what is left."""
        with self.stack:
            if self.ended_at is None:
                self.ten_seconds_without_faults_pass()
                self.stop(really=True)
            if self.cancelled:
                # Which is not how a worker ends: it does not wait for what is slow to close.
                self.time_passes(SLOW_CLOSE_S)
            left = self.runner.run(self._end())
            assert self.task.done(), f"the loop runs on {MOST_S} s after its end began"
            assert not left
            self.all_promises_are_kept()
            assert not self.running
            assert not self.ledger.held
            self._check_ends()
            assert self.task.cancelled() == self.cancelled
            if self.dead and self.ledger.stopped:
                # A job that is stopped ends without a look at the engine.
                self.statuses.add(0)
            if not self.cancelled:
                assert self.loop.state is LoopState.ENDED
                assert self.task.result() in self.statuses

    async def _end(self) -> set[asyncio.Task[Any]]:
        """Wait for the loop's end; return the tasks that it has left behind."""
        over_at = (self.ended_at or 0.0) + MOST_S
        await asyncio.wait({self.task}, timeout=max(over_at - time.monotonic(), 0))
        # What was cancelled in the last turn has a turn to end in.
        await asyncio.sleep(0)
        return {task for task in asyncio.all_tasks() if task not in (self.task, asyncio.current_task())}

    def _check_ends(self) -> None:
        """Each job has one end: a result, the platform's own word, or a line in the log that tells why not."""
        ledger = self.ledger
        # What a cancelled take has brought, the loop has not seen.
        for job_id in ledger.open & ledger.begun if self.cancelled else ledger.open:
            assert self.errors.tell_of(job_id), f"{job_id} was taken and never ended"
            excused = job_id in ledger.faulty or self.errors.returned(job_id) or self.cancelled
            assert excused, f"{job_id} could have been ended"
        for job_id, result in ledger.results:
            if "error" in result:
                assert json.loads(result["error"]) is not None
                # A job that needs less than the loop grants at its end is broken off only by a fault.
                excused = job_id in ledger.faulty | ledger.late or self.statuses != {0} or self.cancelled
                assert excused or self.kinds[job_id] not in ("quick", "slow")
            else:
                # A job is complete only if it has run to its end, whatever broke it off.
                assert result == {"output": ["a", "b"]}
                assert self.kinds[job_id] in ("quick", "slow", "stubborn", "gives in")


# What fails is made smaller, which takes longer than to find it.
TestLoopMachine = pytest.mark.timeout(600)(LoopMachine.TestCase)
TestLoopMachine.settings = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "1000")), stateful_step_count=20, deadline=None
)
