"""The job loop as a Hypothesis state machine, in virtual time.

In any order of jobs, stop signals, faults and shutdowns: no job runs twice at once, each job that was taken has an end,
and the loop leaves no task behind.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
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
from engine.run_clock import CLOCK
from tests import virtual_time
from tests.fake_job_queue import NO_FAULT, POLL_FAULTS, POST_FAULTS, FakeJobQueue, Fault
from tests.unit.queue.fakes import FakeLoad

T = TypeVar("T")
LIMIT = 3
DRAIN_S = 20.0
MAX_END_S = DRAIN_S + FINAL_DELIVERY_TIMEOUT_S + ABANDON_TIMEOUT_S + 1
"""From the start of the loop's end to its end."""
SLOW_CLOSE_S = 6.0
"""For a job that is slow to close: less than the loop waits."""
KINDS = [
    "quick",
    "slow",
    "endless",
    "raises",
    "error",
    "suppresses cancellation",
    "returns on cancellation",
    "slow to close",
    "cancels itself",
]
"""What a job does after its first output."""
SELDOM = st.sampled_from([False, False, True])
"""For rules that end the loop: there is little left to test after one."""


def some_of(values: list[T]) -> st.SearchStrategy[list[T]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=3)


class LogLines(logging.Handler):
    """Warnings and errors of the worker."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def mention(self, job_id: str) -> bool:
        """Return whether a line is about this job."""
        return any(line.startswith(f"Job {job_id}: ") for line in self.lines)

    def say_too_late(self, job_id: str) -> bool:
        """Return whether the job arrived when the worker could no longer run it, and returned to the queue."""
        return any(line.startswith(f"Job {job_id}: arrived too late") for line in self.lines)


class LoopMachine(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.runner = self.stack.enter_context(virtual_time.runner())
        self.log = LogLines()
        logging.getLogger("engine").addHandler(self.log)
        self.stack.callback(logging.getLogger("engine").removeHandler, self.log)
        self.load = FakeLoad()
        self.kinds: dict[str, str] = {}
        self.running: list[str] = []
        self.dead: str | None = None
        self.unreadable = False
        self.ended_at: float | None = None
        self.cancelled = False
        # Exit statuses that are correct.
        self.statuses = {0}
        self.queue = FakeJobQueue(lambda: self.loop.state is LoopState.SERVING)
        self.load_changed = asyncio.Event()
        self.loop = JobLoop(
            self.queue,
            self.handle,
            Admission(self.load, LIMIT, 1200),
            load_changed=self.load_changed,
            failure=self.failure,
            timeouts=Timeouts(drain_s=DRAIN_S, delivery_s=100),
        )
        loop = self.runner.get_loop()
        # An exception that no task retrieves is a violation too.
        loop.set_exception_handler(lambda _, context: self.queue.violations.append(str(context)))
        self.stack.enter_context(virtual_time.watched_for_freezes(loop, self.loop.on_thaw))
        self.task = loop.create_task(self.loop.run())

    def failure(self) -> str | None:
        if self.unreadable:
            raise AttributeError("no such attribute")
        return self.dead

    async def handle(self, job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Yield "a" and "b", unless the job's kind prevents it."""
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
                case "suppresses cancellation":
                    with suppress(asyncio.CancelledError):
                        await asyncio.sleep(2)
                case "returns on cancellation":
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

    # Events

    @initialize(
        target=jobs,
        kinds=some_of(KINDS),
        faults=some_of([NO_FAULT, *POLL_FAULTS]),
        seconds=st.sampled_from([0.0, 0.01, 1.0]),
    )
    def begin(self, kinds: list[str], faults: list[Fault], seconds: float) -> MultipleResults[str]:
        self.queue.take_faults.extend(faults)
        submitted = self.submit(kinds)
        self.time_passes(seconds)
        return submitted

    @rule(target=jobs, kinds=some_of(KINDS))
    def submit(self, kinds: list[str]) -> MultipleResults[str]:
        return multiple(*(self._submit(kind) for kind in kinds))

    def _submit(self, kind: str) -> str:
        job_id = str(len(self.kinds))
        self.kinds[job_id] = kind
        self.submit_again(job_id)
        return job_id

    @rule(job_id=jobs)
    def submit_again(self, job_id: str) -> None:
        self.queue.submit({"id": job_id, "input": self.kinds[job_id]})

    @rule(job_id=jobs)
    def stop_a_job(self, job_id: str) -> None:
        self.queue.stop(job_id)

    @rule(job_id=jobs)
    def a_client_stops_a_job_and_retries_it(self, job_id: str) -> None:
        self.queue.stop(job_id)
        # The loop receives the stop signal and closes the run. Meanwhile the job is delivered again.
        self.time_passes(0.01)
        self.submit_again(job_id)

    @rule(faults=some_of(POLL_FAULTS))
    def the_next_takes_have_faults(self, faults: list[Fault]) -> None:
        self.queue.take_faults.extend(faults)

    @rule(faults=some_of(POLL_FAULTS))
    def the_next_polls_for_stop_signals_have_faults(self, faults: list[Fault]) -> None:
        self.queue.stop_faults.extend(faults)

    @rule(faults=some_of(POST_FAULTS))
    def the_next_posts_have_faults(self, faults: list[Fault]) -> None:
        self.queue.post_faults.extend(faults)

    @rule(down=st.booleans())
    def the_network_changes(self, down: bool) -> None:
        self.queue.down = down

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

    @rule(seconds=st.sampled_from([1.0, 30.0, 1000.0]))
    def the_worker_is_frozen(self, seconds: float) -> None:
        virtual_time.freeze(self.runner.get_loop(), seconds)

    @rule()
    def ten_seconds_without_faults_pass(self) -> None:
        for faults in (self.queue.take_faults, self.queue.stop_faults, self.queue.post_faults):
            faults.clear()
        self.queue.down = False
        self.time_passes(10.0)
        # No backoff is longer, and a loop without a job has room.
        assert self.queue.in_progress or not self.queue.waiting or self.ended_at is not None

    # Ends of the loop

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
                # Without a job the loop may end before it notices.
                self.statuses = {1} if self.running else {1, *self.statuses}

    @rule(really=SELDOM)
    def the_state_of_the_engine_cannot_be_read(self, really: bool) -> None:
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
            # During a take, and without a job in progress, the loop does not read it.
            self.load.kv_cache_usage = usage
            if self.loop.state is not LoopState.SERVING:
                self._ends()
                self.statuses = {1}

    @rule(really=SELDOM)
    def the_loop_is_made_to_fail(self, really: bool) -> None:
        if really:
            self._ends()
            if self._undecided():
                self.statuses = {1}
            self.loop.fail("a test")

    # Once: a second cancellation ends the wait for the remaining tasks.
    @precondition(lambda self: not self.cancelled)
    @rule(really=SELDOM)
    def cancel(self, really: bool) -> None:
        if really:
            self._ends()
            self.cancelled = self.task.cancel()

    def _ends(self) -> None:
        if self.ended_at is None:
            self.ended_at = CLOCK.now()

    def _undecided(self) -> bool:
        return self.loop.state in (LoopState.SERVING, LoopState.DRAINING)

    # Invariants

    @invariant()
    def the_protocol_is_kept(self) -> None:
        # A cancelled loop may lose a job that is on its way. A worker never cancels its loop.
        excused = {"a take was cancelled as it brought jobs"} if self.cancelled else set()
        assert set(self.queue.violations) <= excused
        assert len(set(self.running)) == len(self.running), "a job runs twice at once"
        assert set(self.running) <= self.queue.in_progress
        assert len(self.queue.in_progress) <= LIMIT

    def teardown(self) -> None:
        """End the loop if it has not ended, and check what is left."""
        with self.stack:
            if self.ended_at is None:
                self.ten_seconds_without_faults_pass()
                self.stop(really=True)
            if self.cancelled:
                # A cancelled loop does not wait for a job that is slow to close.
                self.time_passes(SLOW_CLOSE_S)
            left = self.runner.run(self._end())
            assert self.task.done(), f"the loop runs on {MAX_END_S} s after its end began"
            assert not left
            self.the_protocol_is_kept()
            assert not self.running
            assert not self.queue.in_progress
            self._check_ends()
            assert self.task.cancelled() == self.cancelled
            if self.dead and self.queue.stopped:
                # A stopped job ends without a check of the engine.
                self.statuses.add(0)
            if not self.cancelled:
                assert self.loop.state is LoopState.ENDED
                assert self.task.result() in self.statuses

    async def _end(self) -> set[asyncio.Task[Any]]:
        """Wait for the loop to end; return the tasks that it leaves behind."""
        deadline = (self.ended_at or 0.0) + MAX_END_S
        await asyncio.wait({self.task}, timeout=max(deadline - CLOCK.now(), 0))
        # A task that was cancelled in the last turn needs one more to end.
        await asyncio.sleep(0)
        return {task for task in asyncio.all_tasks() if task not in (self.task, asyncio.current_task())}

    def _check_ends(self) -> None:
        """Each job has one end: a result, a stop, or a line in the log that says why it has neither."""
        queue = self.queue
        # The loop has not seen the jobs of a cancelled take.
        for job_id in queue.unfinished & queue.started if self.cancelled else queue.unfinished:
            assert self.log.mention(job_id), f"{job_id} was taken and never ended"
            excused = job_id in queue.faulty or self.log.say_too_late(job_id) or self.cancelled
            assert excused, f"{job_id} could have been ended"
        for job_id, result in queue.results:
            if "error" in result:
                assert json.loads(result["error"]) is not None
                # A job that needs less than the drain timeout is aborted only after a fault.
                excused = job_id in queue.faulty | queue.taken_late or self.statuses != {0} or self.cancelled
                assert excused or self.kinds[job_id] not in ("quick", "slow")
            else:
                # A job completes only if it has run to its end.
                assert result == {"output": ["a", "b"]}
                assert self.kinds[job_id] in ("quick", "slow", "suppresses cancellation", "returns on cancellation")


# Hypothesis shrinks a failing example, which takes longer than finding it.
TestLoopMachine = pytest.mark.timeout(600)(LoopMachine.TestCase)
TestLoopMachine.settings = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "1000")), stateful_step_count=20, deadline=None
)
