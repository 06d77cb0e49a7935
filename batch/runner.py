"""The run: sends each line that is not answered as a job, waits for the job's end, and writes the answer."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tenacity import AsyncRetrying, RetryCallState, retry_if_result, stop_after_attempt, wait_exponential_jitter

from batch.endpoint import Endpoint
from batch.errors import RejectedError, ResultError
from batch.journal import Journal
from batch.outcome import FINAL_STATES, Outcome, result_link
from batch.request_file import Request, RequestFile

_SYNC_INTERVAL_S: Final = 0.5
# Results are kept for 30 minutes.
_MAX_POLL_INTERVAL_S: Final = 30.0
_MIN_POLL_INTERVAL_S: Final = 0.5
_POLL_INTERVAL_RATIO: Final = 0.25
_RETRY_WAIT = wait_exponential_jitter(multiplier=1.0, max=60.0)


class Progress(Protocol):
    """What shows a run's progress; `tqdm` implements it."""

    def update(self, n: float = 1) -> Any:
        """Count answered lines."""

    def set_postfix(self, *, refresh: bool, **counts: int) -> Any:
        """Show counts beside the bar."""


@dataclass(frozen=True)
class Limits:
    """Limits of a run.

    Args:
        max_jobs: maximum number of jobs in the queue and running.
        attempts: maximum number of jobs for one line, in one run.
    """

    max_jobs: int
    attempts: int


class Run:
    """One run over a file.

    Args:
        requests: the input.
        journal: open; what earlier runs did, and where this one records.
        endpoint: where jobs are sent.
        limits: of jobs and attempts.
        progress: shows how far it is.
    """

    def __init__(
        self, requests: RequestFile, journal: Journal, endpoint: Endpoint, limits: Limits, progress: Progress
    ) -> None:
        self._requests = requests
        self._journal = journal
        self._endpoint = endpoint
        self._limits = limits
        self._progress = progress
        # Jobs of earlier runs, to be collected.
        self._sent = dict(journal.jobs)
        self._counts = {"jobs": 0, "repeated": 0, "failed": journal.failed}
        # From submission to end, of the job that ended last.
        self._job_s = 0.0

    async def run(self) -> None:
        """Return when every line is answered.

        Raises:
            BatchError: the run cannot go on; what was answered is written, and a later run continues.
        """
        slots = asyncio.Semaphore(self._limits.max_jobs)
        answered = self._journal.answered
        requests = [request for request in self._requests.requests if request.custom_id not in answered]
        # Jobs of an earlier run first: the platform keeps their results for a limited time.
        requests.sort(key=lambda request: request.custom_id not in self._sent)
        try:
            async with asyncio.TaskGroup() as group:
                syncing = group.create_task(self._sync())
                async with asyncio.TaskGroup() as lines:
                    for request in requests:
                        await slots.acquire()
                        line = lines.create_task(self._answer(request))
                        line.add_done_callback(lambda _: slots.release())
                syncing.cancel()
        except ExceptionGroup as errors:
            raise _first(errors) from None

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_INTERVAL_S)
            self._journal.sync()

    async def _answer(self, request: Request) -> None:
        """Answer one line, with as many jobs as that takes."""
        collects = request.custom_id in self._sent
        retrying = AsyncRetrying(
            retry=retry_if_result(lambda outcome: outcome.retryable),
            stop=stop_after_attempt(self._limits.attempts + collects),
            wait=_RETRY_WAIT,
            before_sleep=lambda _: self._count(repeated=1),
            retry_error_callback=_last_outcome,
        )
        outcome: Outcome = await retrying(self._attempt, request)
        self._journal.answer(request.custom_id, outcome.document(request.custom_id), failed=outcome.failed)
        self._count(failed=int(outcome.failed))
        self._progress.update()

    async def _attempt(self, request: Request) -> Outcome:
        """Send a job and wait for its end; collect the job of an earlier run first."""
        self._count(jobs=1)
        job = self._sent.pop(request.custom_id, None)
        try:
            wait_s = 0.0
            if job is None:
                job = await self._endpoint.run(self._requests.job(request))
                self._journal.sent(request.custom_id, job)
                wait_s = self._poll_interval_s(0.0)
            document = await self._end_of(job, wait_s)
            if document is not None and (link := result_link(document)) is not None:
                document["output"] = await self._endpoint.result(link)
            return Outcome.of_job(job, document)
        except RejectedError as error:
            return Outcome.rejected(error.status, str(error), job=job or "")
        except ResultError as error:
            return Outcome.error("result_unavailable", str(error), retryable=True, job=job or "")
        finally:
            self._count(jobs=-1)

    async def _end_of(self, job: str, wait_s: float) -> dict[str, Any] | None:
        """Wait for the end of a job; return its status, None if the platform does not know it any more."""
        begun = time.monotonic()
        while True:
            await asyncio.sleep(wait_s)
            document = await self._endpoint.status(job)
            if document is None or document["status"] in FINAL_STATES:
                break
            wait_s = self._poll_interval_s(time.monotonic() - begun)
        if document is not None and document["status"] == "COMPLETED":
            self._job_s = ((document.get("delayTime") or 0) + (document.get("executionTime") or 0)) / 1000
        return document

    def _poll_interval_s(self, elapsed_s: float) -> float:
        """Return when to ask again for a job: when it has taken as long as the last one; then at growing intervals."""
        interval_s = max(self._job_s - elapsed_s, _POLL_INTERVAL_RATIO * elapsed_s, _MIN_POLL_INTERVAL_S)
        return min(interval_s, _MAX_POLL_INTERVAL_S)

    def _count(self, **changes: int) -> None:
        for name, change in changes.items():
            self._counts[name] += change
        self._progress.set_postfix(refresh=False, **self._counts)


def _last_outcome(state: RetryCallState) -> Outcome:
    """Return the outcome of the last attempt; raise its error if it has none."""
    if state.outcome is None:
        raise AssertionError("an attempt has ended")
    outcome: Outcome = state.outcome.result()
    return outcome


def _first(error: Exception) -> Exception:
    """Return the first error of a group that is not a group itself."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
