"""An in-memory job queue with faults on demand, and a record of what became of each job.

Where the job loop breaks the protocol, a line is added to `FakeJobQueue.violations`: the loop would catch an exception.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.errors import DeliveryError, RateLimitedError, RefusedDeliveryError
from engine.queue.delivery import JobDelivery
from engine.queue.protocol import POLL_CANCEL_GRACE_S, Delivery, PostKind
from engine.run_clock import CLOCK

# How long a poll is held open; the same as the platform's.
LONG_POLL_S = 30.0
# A take that was about to begin when the loop stops may still be called: it is cancelled before it can bring a job.
LATE_TAKE_S = 0.001


@dataclass(frozen=True)
class Fault:
    """What happens to one call.

    Attributes:
        before: raised before the call takes effect.
        after: raised when the call has taken effect.
        latency_s: delay of the response.
        responds_at_once: a poll returns immediately, with whatever there is.
        ignores_cancel: a poll does not notice `stop_polling`, as may happen on an encrypted connection. It may bring
            jobs until it ends.
    """

    before: Exception | None = None
    after: Exception | None = None
    latency_s: float = 0.0
    responds_at_once: bool = False
    ignores_cancel: bool = False


NO_FAULT = Fault()
POLL_FAULTS = [
    Fault(before=ConnectionError("cannot connect")),
    Fault(before=RateLimitedError("wait")),
    Fault(before=ValueError("nonsense")),
    Fault(after=ConnectionError("closed")),
    Fault(latency_s=0.3),
    Fault(latency_s=4.0),
    Fault(responds_at_once=True),
    Fault(ignores_cancel=True),
    Fault(ignores_cancel=True, latency_s=1.0),
]
POST_FAULTS = [
    Fault(before=DeliveryError("status 500")),
    Fault(before=DeliveryError("timeout"), latency_s=60.0),
    Fault(before=RefusedDeliveryError("status 413")),
    Fault(after=DeliveryError("closed")),
    Fault(latency_s=0.3),
    Fault(latency_s=8.0),
]


class FakeJobQueue:
    """Implements `engine.queue.protocol.JobQueue`.

    Args:
        is_serving: returns whether the loop may still take jobs.

    Attributes:
        waiting: jobs in the queue.
        take_faults, stop_faults, post_faults: of the next calls; without one left, calls succeed.
        down: whether every post fails.
        reconnects: how often the loop has asked for new connections.
        take_counts: how many jobs each take asked for.
        in_progress: jobs that the pings would name.
        taken_late: jobs that a take has brought after the loop began to end.
        started: jobs that the loop has reported as in progress since they were taken.
        unfinished: jobs that were taken and have no end yet.
        stopped: jobs that were stopped while they were in progress.
        must_not_post: jobs that were stopped while they ran: a result of theirs is a violation.
        faulty: jobs of which a post was late or failed.
        outputs: streamed outputs, by job id, in order of arrival.
        results: results, by job id, in order of arrival.
        violations: what the loop did against the protocol.
    """

    def __init__(self, is_serving: Callable[[], bool]) -> None:
        self._is_serving = is_serving
        self._stop_requests: list[str] = []
        self._changed = asyncio.Event()
        self._polling_stopped = asyncio.Event()
        self._result_posted = asyncio.Event()
        self._ended_at: float | None = None
        self._is_taking = False
        self._posting_result: set[str] = set()
        self.waiting: deque[Any] = deque()
        self.take_faults: deque[Fault] = deque()
        self.stop_faults: deque[Fault] = deque()
        self.post_faults: deque[Fault] = deque()
        self.down = False
        self.reconnects = 0
        self.take_counts: list[int] = []
        self.in_progress: set[str] = set()
        self.taken_late: set[str] = set()
        self.started: set[str] = set()
        self.unfinished: set[str] = set()
        self.stopped: set[str] = set()
        self.must_not_post: set[str] = set()
        self.faulty: set[str] = set()
        self.outputs: list[tuple[str, Any]] = []
        self.results: list[tuple[str, dict[str, Any]]] = []
        self.violations: list[str] = []

    # For tests

    def submit(self, job: Any) -> None:
        """Queue a job; one that was queued before is delivered again."""
        self.waiting.append(job)
        self._notify()

    def stop(self, job_id: str) -> None:
        """Ask the loop to stop a job."""
        self._stop_requests.append(job_id)
        self._notify()

    async def result(self, job_id: str, run: int = 1) -> dict[str, Any]:
        """Wait for the result of a job's n-th run."""
        async with asyncio.timeout(10):
            while len(results := [result for one, result in self.results if one == job_id]) < run:
                self._result_posted.clear()
                await self._result_posted.wait()
        return results[run - 1]

    # For the loop

    async def take(self, count: int) -> list[Any]:
        self._expect(not self._is_taking, "two takes at once")
        self._expect(count > 0, "a take asks for no job")
        is_late = self._ended_at is not None and CLOCK.now() - self._ended_at > LATE_TAKE_S
        self._expect(not is_late, "a take after the loop began to end")
        self.take_counts.append(count)
        self._polling_stopped.clear()
        self._is_taking = True
        try:
            return await self._take(count, self.take_faults.popleft() if self.take_faults else NO_FAULT)
        finally:
            self._is_taking = False

    async def _take(self, count: int, fault: Fault) -> list[Any]:
        if fault.before:
            raise fault.before
        await self._poll(lambda: bool(self.waiting), fault, None if fault.ignores_cancel else self._polling_stopped)
        is_wanted = fault.ignores_cancel or not self._polling_stopped.is_set()
        jobs = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))] if is_wanted else []
        try:
            await asyncio.sleep(fault.latency_s)
        except asyncio.CancelledError:
            # After the grace period the loop may cancel the call. The platform delivers its jobs again.
            is_overdue = self._ended_at is not None and CLOCK.now() >= self._ended_at + POLL_CANCEL_GRACE_S
            self._expect(not jobs or is_overdue, "a take was cancelled as it brought jobs")
            raise
        if fault.after:
            # Its jobs are lost on the way, which no loop can prevent.
            raise fault.after
        for job in jobs:
            job_id = job.get("id") if isinstance(job, dict) else None
            if not isinstance(job_id, str):
                continue
            # An unfinished job is redelivered. A finished one runs again, even if its last run is still in progress.
            if job_id not in self.unfinished:
                self._begin_run(job_id)
            if self._ended_at is not None:
                self.taken_late.add(job_id)
        return jobs

    def stop_polling(self) -> None:
        self._polling_stopped.set()
        if not self._is_serving() and self._ended_at is None:
            self._ended_at = CLOCK.now()

    def reconnect(self) -> None:
        """End the poll in progress, as a closed connection does; a job that is on its way arrives."""
        self.reconnects += 1
        self._polling_stopped.set()

    async def stop_signals(self) -> list[str]:
        fault = self.stop_faults.popleft() if self.stop_faults else NO_FAULT
        if fault.before:
            raise fault.before
        await self._poll(lambda: bool(self._stop_requests), fault, None)
        await asyncio.sleep(fault.latency_s)
        if fault.after:
            raise fault.after
        job_ids, self._stop_requests = self._stop_requests, []
        for job_id in self.unfinished & self.in_progress & set(job_ids):
            self.unfinished.discard(job_id)
            self.stopped.add(job_id)
            # Where the result is already being posted, or the loop ends, a result may still arrive.
            if self._is_serving() and job_id not in self._posting_result:
                self.must_not_post.add(job_id)
        return job_ids

    def delivery(self, job_id: str, deadline: float) -> Delivery:
        return JobDelivery(self.post, job_id, deadline)

    async def post(self, kind: PostKind, job_id: str, body: bytes) -> None:
        fault = self.post_faults.popleft() if self.post_faults else NO_FAULT
        if fault != NO_FAULT or self.down:
            self.faulty.add(job_id)
        self._expect(job_id in self.in_progress, f"{kind} posted for {job_id}, which the pings do not name")
        if kind is PostKind.RESULT:
            self._posting_result.add(job_id)
            self._expect(job_id not in self.must_not_post, f"a result posted for {job_id}, which was stopped")
        if self.down:
            raise DeliveryError("down")
        if fault.before:
            await asyncio.sleep(fault.latency_s)
            raise fault.before
        if job_id not in self.unfinished:
            raise RefusedDeliveryError("status 400: the job is not in progress")
        document = json.loads(body)
        if kind is PostKind.RESULT:
            self.results.append((job_id, document))
            self.unfinished.discard(job_id)
            self._result_posted.set()
        else:
            self.outputs.append((job_id, document["output"]))
        await asyncio.sleep(fault.latency_s)
        if fault.after:
            raise fault.after

    def add_in_progress(self, job_id: str) -> None:
        self._expect(job_id not in self.in_progress, f"{job_id} runs twice at once")
        # A job that was redelivered while its last run ended begins another run here.
        self._begin_run(job_id)
        self.in_progress.add(job_id)
        self.started.add(job_id)

    def remove_in_progress(self, job_id: str) -> None:
        self._expect(job_id in self.in_progress, f"{job_id} was removed twice")
        self.in_progress.discard(job_id)
        self._posting_result.discard(job_id)

    def _begin_run(self, job_id: str) -> None:
        self.unfinished.add(job_id)
        self.started.discard(job_id)
        self.must_not_post.discard(job_id)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _expect(self, condition: bool, violation: str) -> None:
        if not condition:
            self.violations.append(violation)

    async def _poll(self, is_ready: Callable[[], bool], fault: Fault, cancelled: asyncio.Event | None) -> None:
        """Wait until there is something to return, the poll is cancelled, or its time is over."""
        deadline = time.monotonic() + LONG_POLL_S
        while not (
            is_ready() or fault.responds_at_once or (cancelled and cancelled.is_set()) or time.monotonic() >= deadline
        ):
            events = [self._changed, cancelled] if cancelled else [self._changed]
            waits = {asyncio.ensure_future(event.wait()) for event in events}
            try:
                await asyncio.wait(waits, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
