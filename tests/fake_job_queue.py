"""The platform in memory, with faults on demand, for the job loop: it keeps account of what became of every job.

A promise of the loop that is broken is noted in `Ledger.broken`: the loop would catch what a call raises.
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
from engine.queue.protocol import POLL_CANCEL_GRACE_S, PostKind

# A poll is held so long, as the platform does.
HELD_S = 30.0
# A few turns: a take that was about to begin at the very end is let go before it can bring anything.
AT_ONCE_S = 0.001


@dataclass(frozen=True)
class Fate:
    """What becomes of one call.

    Args:
        before: raised before the call has its effect.
        after: raised when it has had its effect.
        late_s: the answer is so long under way.
        at_once: a poll is answered at once, with what there is.
        deaf: a poll does not hear that it was let go, as where the connection is encrypted; it may bring jobs until
            its own end.
    """

    before: Exception | None = None
    after: Exception | None = None
    late_s: float = 0.0
    at_once: bool = False
    deaf: bool = False


FINE = Fate()
POLL_FATES = [
    Fate(before=ConnectionError("cannot connect")),
    Fate(before=RateLimitedError("wait")),
    Fate(before=ValueError("nonsense")),
    Fate(after=ConnectionError("closed")),
    Fate(late_s=0.3),
    Fate(late_s=4.0),
    Fate(at_once=True),
    Fate(deaf=True),
    Fate(deaf=True, late_s=1.0),
]
POST_FATES = [
    Fate(before=DeliveryError("status 500")),
    Fate(before=DeliveryError("timeout"), late_s=60.0),
    Fate(before=RefusedDeliveryError("status 413")),
    Fate(after=DeliveryError("closed")),
    Fate(late_s=0.3),
    Fate(late_s=8.0),
]


class Ledger:
    """The platform: `engine.queue.job_loop.Platform`.

    Each call meets the next of `takes`, `polls` or `posts`; without one left, all is fine.

    Args:
        serving: whether the loop may still ask for jobs.
    """

    def __init__(self, serving: Callable[[], bool]) -> None:
        self._serving = serving
        self._to_stop: list[str] = []
        self._changed = asyncio.Event()
        self._freed = asyncio.Event()
        self._ended_at: float | None = None
        self._taking = False
        self._posting: set[str] = set()
        self.waiting: deque[dict[str, Any]] = deque()
        self.takes: deque[Fate] = deque()
        self.polls: deque[Fate] = deque()
        self.posts: deque[Fate] = deque()
        self.down = False
        self.held: set[str] = set()
        """Jobs that the pings would name."""
        self.taken: set[str] = set()
        """Jobs that have been given out."""
        self.late: set[str] = set()
        """Jobs that have been given out after the loop's end had begun."""
        self.begun: set[str] = set()
        """Jobs that the loop has held since they were given out."""
        self.open: set[str] = set()
        """Jobs that have been given out, and have no end yet."""
        self.stopped: set[str] = set()
        """Jobs that have been stopped while the loop held them, once."""
        self.told: set[str] = set()
        """Jobs that the loop has been told to stop while they ran."""
        self.faulty: set[str] = set()
        """Jobs of which a delivery was late or failed."""
        self.results: list[tuple[str, dict[str, Any]]] = []
        self.broken: list[str] = []

    def submit(self, job: dict[str, Any]) -> None:
        """Let a job wait, or one wait once more."""
        self.waiting.append(job)
        self._wake()

    def stop(self, job_id: str) -> None:
        """Tell the loop to stop a job."""
        self._to_stop.append(job_id)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _promise(self, kept: bool, what: str) -> None:
        if not kept:
            self.broken.append(what)

    async def take(self, count: int) -> list[dict[str, Any]]:
        self._promise(not self._taking, "two takes are under way")
        self._promise(count > 0, "a take asks for no job")
        late = self._ended_at is not None and time.monotonic() - self._ended_at > AT_ONCE_S
        self._promise(not late, "jobs are asked for after the end has begun")
        self._freed.clear()
        self._taking = True
        try:
            return await self._take(count, self.takes.popleft() if self.takes else FINE)
        finally:
            self._taking = False

    async def _take(self, count: int, fate: Fate) -> list[dict[str, Any]]:
        if fate.before:
            raise fate.before
        await self._poll(lambda: bool(self.waiting), fate, None if fate.deaf else self._freed)
        wanted = fate.deaf or not self._freed.is_set()
        jobs = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))] if wanted else []
        try:
            await asyncio.sleep(fate.late_s)
        except asyncio.CancelledError:
            # What takes longer than the loop waits for is cut off, and the platform's to give out again.
            cut_off = self._ended_at is not None and time.monotonic() >= self._ended_at + POLL_CANCEL_GRACE_S
            self._promise(not jobs or cut_off, "a take was cancelled as it brought jobs")
            raise
        if fate.after:
            # Its jobs are lost on the way, which is nobody's fault.
            raise fate.after
        for job in jobs:
            # One that is open is only given out once more; any other is to be run anew, even if it is still held.
            if job["id"] not in self.open:
                self._give(job["id"])
            if self._ended_at is not None:
                self.late.add(job["id"])
        return jobs

    def stop_polling(self) -> None:
        self._freed.set()
        if not self._serving() and self._ended_at is None:
            self._ended_at = time.monotonic()

    async def stop_signals(self) -> list[str]:
        fate = self.polls.popleft() if self.polls else FINE
        if fate.before:
            raise fate.before
        await self._poll(lambda: bool(self._to_stop), fate, None)
        await asyncio.sleep(fate.late_s)
        if fate.after:
            raise fate.after
        job_ids, self._to_stop = self._to_stop, []
        for job_id in self.open & self.held & set(job_ids):
            self.open.discard(job_id)
            self.stopped.add(job_id)
            # Where its end is decided already, the result may still come.
            if self._serving() and job_id not in self._posting:
                self.told.add(job_id)
        return job_ids

    async def _poll(self, found: Callable[[], bool], fate: Fate, freed: asyncio.Event | None) -> None:
        """Hold a call until there is something, or nobody wants it any more, or its time is over."""
        over_at = time.monotonic() + HELD_S
        while not (found() or fate.at_once or (freed and freed.is_set()) or time.monotonic() >= over_at):
            events = [self._changed, freed] if freed else [self._changed]
            waits = {asyncio.ensure_future(event.wait()) for event in events}
            try:
                await asyncio.wait(waits, timeout=over_at - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    async def post(self, kind: PostKind, job_id: str, body: bytes) -> None:
        fate = self.posts.popleft() if self.posts else FINE
        if fate != FINE or self.down:
            self.faulty.add(job_id)
        self._promise(job_id in self.held, f"{kind} is posted for {job_id}, which the pings do not name")
        if kind is PostKind.RESULT:
            self._posting.add(job_id)
            self._promise(job_id not in self.told, f"a result is posted for {job_id}, which was to be stopped")
        if self.down:
            raise DeliveryError("down")
        if fate.before:
            await asyncio.sleep(fate.late_s)
            raise fate.before
        if job_id not in self.open:
            raise RefusedDeliveryError("status 400: nobody waits for it")
        if kind is PostKind.RESULT:
            self.results.append((job_id, json.loads(body)))
            self.open.discard(job_id)
        await asyncio.sleep(fate.late_s)
        if fate.after:
            raise fate.after

    def add_in_progress(self, job_id: str) -> None:
        self._promise(job_id not in self.held, f"{job_id} is held twice")
        # Given out when its last run had not quite ended: it is another run.
        self._give(job_id)
        self.held.add(job_id)
        self.begun.add(job_id)

    def remove_in_progress(self, job_id: str) -> None:
        self._promise(job_id in self.held, f"{job_id} is released twice")
        self.held.discard(job_id)
        self._posting.discard(job_id)

    def _give(self, job_id: str) -> None:
        self.taken.add(job_id)
        self.open.add(job_id)
        self.begun.discard(job_id)
        self.told.discard(job_id)
