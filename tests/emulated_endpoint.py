"""An endpoint of the emulator with scripted workers, in virtual time: a day in a minute.

What runs is real: the emulator's queue, long polls, fleet and autoscaler, on the clock that they are given, and in each
worker the real job loop and admission. Scripted are the engine, which makes a step after the other as vLLM does, the
time that a start takes, and the calls between them, which are not sent over HTTP.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from bench.advisor.simulation import EndpointPlan, Outcome
from bench.advisor.trace import Trace
from bench.advisor.worker_profile import WorkerProfile
from emulator.core.autoscaler import TICK_INTERVAL_S
from emulator.core.endpoint import Surroundings
from emulator.core.faults import Faults
from emulator.core.job import Job, JobStatus, Submission
from emulator.core.job_queue import JOBS_QUEUED_TOPIC
from emulator.core.process import Process, ProcessListener
from emulator.core.runpod_endpoint import RunPodEndpoint
from emulator.core.webhooks import Webhooks
from emulator.core.worker import TAKING_STATES
from emulator.errors import TooManyRequestsError
from emulator.redaction import Redaction
from emulator.settings import EndpointSettings
from engine.backend.statistics import Statistics
from engine.errors import JobError
from engine.queue.admission import Admission
from engine.queue.job_loop import JobLoop
from engine.queue.protocol import Delivery
from tests import virtual_time

# Tokens that one step gives to each running request. vLLM's step gives one; two halve the time that a test takes.
_STEP_TOKENS = 2
_PING_INTERVAL_S = 10.0


class SteppedEngine:
    """Runs all requests together, step by step; a request that comes during a step waits for the next one."""

    def __init__(self, profile: WorkerProfile, concurrency: int) -> None:
        self._rates = profile.rates(concurrency)
        self._ttfts_s = profile.ttfts_s(concurrency)
        self._left: dict[asyncio.Event, int] = {}
        self._came = asyncio.Event()

    async def handle(self, job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Yield the first token, and the others when all of them are there."""
        ended = asyncio.Event()
        self._left[ended] = job["input"]["tokens"]
        self._came.set()
        await asyncio.sleep(self._ttfts_s[len(self._left)])
        yield "first"
        await ended.wait()
        yield "others"

    async def run(self) -> None:
        """Make steps as long as there are requests."""
        while True:
            if not self._left:
                self._came.clear()
                await self._came.wait()
            batch = list(self._left)
            await asyncio.sleep(_STEP_TOKENS / self._rates[len(batch)])
            for ended in batch:
                self._left[ended] -= _STEP_TOKENS
                if self._left[ended] <= 0:
                    del self._left[ended]
                    ended.set()


class _Delivery:
    """Delivers one job's outputs to the emulator's queue."""

    time_limit_s: float | None = None

    def __init__(self, endpoint: RunPodEndpoint, worker: str, job: str) -> None:
        self._endpoint, self._worker, self._job = endpoint, worker, job
        self.delivered_count = 0

    async def stream(self, output: Any) -> None:
        self._endpoint.queue.stream(self._worker, self._job, output)
        self.delivered_count += 1

    async def finish(self, error: JobError | None = None, *, replace_worker: bool = False) -> str:
        assert not replace_worker
        self._endpoint.queue.finish(self._worker, self._job, "all", None if error is None else str(error))
        return "completed" if error is None else "failed"

    async def stopped(self) -> None:
        raise AssertionError("no job is stopped")


class _Queue:
    """The worker's side of the emulator's queue, as `emulator/api/worker.py` serves it. Implements `JobQueue`."""

    def __init__(self, endpoint: RunPodEndpoint, worker: str) -> None:
        self._endpoint, self._worker = endpoint, worker
        self._in_progress: set[str] = set()

    async def take(self, count: int) -> list[Any]:
        endpoint, worker = self._endpoint, self._endpoint.fleet.on_poll(self._worker)

        def poll() -> list[Job] | None:
            if worker.state not in TAKING_STATES:
                return []
            return endpoint.queue.take(self._worker, count) or None

        disconnect = asyncio.get_running_loop().create_future()
        jobs = await endpoint.long_poll.wait_for(JOBS_QUEUED_TOPIC, poll, endpoint.settings.long_poll_s, disconnect)
        return [job.worker_document() for job in jobs or []]

    def stop_polling(self) -> None:
        """Do nothing: the emulator ends the poll of a worker that it stops."""

    def reconnect(self) -> None:
        raise AssertionError("no worker is frozen")

    async def stop_signals(self) -> list[str]:
        await asyncio.sleep(self._endpoint.settings.long_poll_s)
        return []

    def delivery(self, job_id: str, deadline: float) -> Delivery:
        del deadline
        return _Delivery(self._endpoint, self._worker, job_id)

    def add_in_progress(self, job_id: str) -> None:
        self._in_progress.add(job_id)

    def remove_in_progress(self, job_id: str) -> None:
        self._in_progress.discard(job_id)

    async def ping(self) -> None:
        """Report the jobs in progress now and then."""
        while True:
            await asyncio.sleep(_PING_INTERVAL_S)
            self._endpoint.fleet.touch(self._worker)
            self._endpoint.queue.ping(self._worker, self._in_progress)


class _WorkerProcess:
    """A worker as its fleet sees it. Implements `Process`."""

    pid: int | None = 1

    def __init__(self, run: EmulatedRun, worker: str, listener: ProcessListener) -> None:
        self.started_s = time.monotonic()
        self.ready_s = self.exited_s = float("inf")
        self._loop: JobLoop | None = None
        self._task = asyncio.create_task(self._main(run, worker, listener))

    async def _main(self, run: EmulatedRun, worker: str, listener: ProcessListener) -> None:
        await asyncio.sleep(run.cold_start_s())
        self.ready_s = time.monotonic()
        run.ready_s[worker] = self.ready_s
        engine = SteppedEngine(run.profile, run.plan.concurrency)
        queue = _Queue(run.endpoint, worker)
        admission = Admission(Statistics(), run.plan.concurrency, cache_tokens=10**9)
        self._loop = JobLoop(queue, engine.handle, admission)
        others = [asyncio.create_task(work) for work in (engine.run(), queue.ping())]
        status = await self._loop.run()
        for task in others:
            task.cancel()
        await asyncio.sleep(run.profile.stop_s)
        self.exited_s = time.monotonic()
        listener.on_exit(status)

    def terminate(self) -> None:
        assert self._loop is not None, "only idle workers are stopped"
        self._loop.stop()

    def kill(self) -> None:
        raise AssertionError("no worker fails")

    def freeze(self) -> None:
        raise AssertionError("no endpoint has FlashBoot")

    thaw = freeze


class EmulatedRun:
    """One endpoint under a trace, within `virtual_time.runner`."""

    def __init__(self, profile: WorkerProfile, trace: Trace, plan: EndpointPlan, seed: int = 0) -> None:
        self.profile, self.trace, self.plan = profile, trace, plan
        self._random = random.Random(seed)  # noqa: S311 (not used for security)
        self._processes: list[_WorkerProcess] = []
        self.ready_s: dict[str, float] = {}
        document = {
            "command": ["scripted"],
            "scalerType": plan.scaler_type,
            "scalerValue": plan.scaler_value,
            "workersMin": plan.workers_min,
            "workersMax": plan.workers_max,
            "idleTimeout": plan.idle_timeout_s,
            "executionTimeoutMs": 86_400_000,
            "rateLimits": False,
        }
        surroundings = Surroundings(
            clock=lambda: time.monotonic(),  # noqa: PLW0108 (the time is virtual only while the run lasts)
            wall_clock=lambda: time.monotonic(),  # noqa: PLW0108
            start=self._start,
            faults=Faults(),
            redaction=Redaction({}, ()),
            event_log=lambda _endpoint, _line: None,
            worker_log=lambda _worker, _line: None,
        )
        settings = EndpointSettings.model_validate(document)
        self.endpoint = RunPodEndpoint(
            settings, surroundings, base_url="http://none", ca_environment={}, webhooks=Webhooks()
        )

    def cold_start_s(self) -> float:
        """Return how long the next start takes."""
        return self._random.choice(self.profile.cold_starts_s)

    def _start(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str | None, listener: ProcessListener
    ) -> Process:
        del command, cwd
        process = _WorkerProcess(self, env["RUNPOD_POD_ID"], listener)
        self._processes.append(process)
        return process

    async def run(self) -> Outcome:
        """Send the requests, and wait for all answers and the end of the trace."""
        outcome = Outcome()
        ticking = asyncio.create_task(self._tick(outcome))
        jobs: list[Job] = []
        for arrival_s, tokens in zip(self.trace.arrivals_s, self.trace.tokens, strict=True):
            await asyncio.sleep(arrival_s - time.monotonic())
            try:
                jobs.append(self.endpoint.queue.submit(Submission(input={"tokens": tokens}), retention_s=1.0))
            except TooManyRequestsError:
                outcome.rejected += 1
            outcome.max_waiting = max(outcome.max_waiting, self.endpoint.queue.in_queue)
        for job in jobs:
            while not job.status.final:  # noqa: ASYNC110 (one test of a state is enough)
                await asyncio.sleep(TICK_INTERVAL_S)
        outcome.ended_s = max((job.ended_at or 0.0 for job in jobs), default=0.0)
        await asyncio.sleep(self.trace.duration_s - time.monotonic())
        ticking.cancel()
        assert {job.status for job in jobs} <= {JobStatus.COMPLETED}
        self._read(outcome, jobs)
        return outcome

    async def _tick(self, outcome: Outcome) -> None:
        while True:
            self.endpoint.fleet.tick()
            outcome.max_workers = max(outcome.max_workers, len(self.endpoint.fleet.workers()))
            await asyncio.sleep(TICK_INTERVAL_S)

    def _read(self, outcome: Outcome, jobs: Sequence[Job]) -> None:
        now_s = time.monotonic()
        outcome.ttfts_s = [(job.first_output_at or now_s) - job.submitted_at for job in jobs]
        outcome.cold_requests = sum(self.ready_s[job.worker or ""] > job.submitted_at for job in jobs)
        outcome.cold_starts = len(self._processes) - self.plan.workers_min
        outcome.gpu_s = sum(min(process.exited_s, now_s) - process.started_s for process in self._processes)


def run_emulated(profile: WorkerProfile, trace: Trace, plan: EndpointPlan, seed: int = 0) -> Outcome:
    """Run a trace on the emulator's endpoint in virtual time."""
    with virtual_time.runner() as loop:

        async def run() -> Outcome:
            return await EmulatedRun(profile, trace, plan, seed).run()

        return loop.run(run())
