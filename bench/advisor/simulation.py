"""An endpoint in simulated time: a queue, workers that come and go as the platform's scaler decides, and requests.

The scaler is the emulator's (`emulator.core.autoscaler.scale`), and so is the limit of the queue. A worker takes from
the queue up to its concurrency; of several that could take a request, one takes it at random. Requests on a worker
share its measured throughput (processor sharing): each one runs at `rate(n)` tokens a second while n are running.

Time is in seconds. simpy keeps it; `docs/decisions/0223` says what that costs.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil, inf
from typing import NamedTuple, cast

import simpy

from bench.advisor.trace import Trace
from bench.advisor.worker_profile import WorkerProfile
from emulator.core.autoscaler import TICK_INTERVAL_S, WorkerCounts, next_change_s, scale
from emulator.core.job_queue import FULL_QUEUE_JOBS, FULL_QUEUE_JOBS_PER_WORKER
from emulator.core.work import QueueLoad

# Tokens that rounding may leave of a request.
_ROUNDING_TOKENS = 1e-6


@dataclass(frozen=True)
class EndpointPlan:
    """The settings of an endpoint, and the worker's MAX_CONCURRENCY. Implements the scaler's `ScalingSettings`."""

    scaler_type: str = "QUEUE_DELAY"
    scaler_value: float = 4.0
    concurrency: int = 8
    idle_timeout_s: float = 5.0
    workers_min: int = 0
    workers_max: int = 3


class Sample(NamedTuple):
    """The state of an endpoint at one time, in seconds: requests that wait and that run, and workers."""

    time_s: float
    waiting: int
    running: int
    workers: int


@dataclass
class Outcome:
    """What a simulation, or a run in the emulator, has shown.

    Args:
        ttfts_s: time from arrival to first token of each request that was answered.
        cold_requests: requests whose worker was not ready when they came.
        cold_starts: workers that were started, without those of the minimum at the beginning.
        gpu_s: worker-seconds, from start to exit.
        active_gpu_s: those of them that `workersMin` keeps, which a platform may sell at another price.
        max_workers: most workers at once.
        max_waiting: most requests in the queue at once.
        max_in_flight: most requests that waited or ran at once.
        rejected: requests that the platform refused because the queue was full.
        ended_s: when the last answer ended.
        samples: the state from time to time, if that was asked for.
    """

    ttfts_s: list[float] = field(default_factory=list)
    cold_requests: int = 0
    cold_starts: int = 0
    gpu_s: float = 0.0
    active_gpu_s: float = 0.0
    max_workers: int = 0
    max_waiting: int = 0
    max_in_flight: int = 0
    rejected: int = 0
    ended_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)


class _Worker:
    """A worker and its requests.

    Attributes:
        progress: tokens that a request which ran since the worker is ready would have by now.
        ends: of each running request, the progress at which it has ended; a heap.
        next_end_s: the earliest time for which a check is scheduled.
        position: where it is in the list of workers with room; -1 if it is not.
    """

    __slots__ = ("ends", "id", "next_end_s", "position", "progress", "ready_s", "started_s", "updated_s")

    def __init__(self, worker_id: str, now_s: float) -> None:
        self.id = worker_id
        self.started_s = now_s
        self.ready_s = inf
        self.ends: list[float] = []
        self.progress = 0.0
        self.updated_s = now_s
        self.next_end_s = inf
        self.position = -1


class Simulation:
    """One endpoint under a trace.

    Args:
        worker: the worker's figures.
        trace: the requests.
        plan: the endpoint's settings.
        seed: decides which worker takes a request, and which measured cold start a worker has.
        sample_s: time between two samples; none are kept if it is 0.
    """

    def __init__(
        self, worker: WorkerProfile, trace: Trace, plan: EndpointPlan, *, seed: int = 0, sample_s: float = 0.0
    ) -> None:
        self._worker = worker
        self._trace = trace
        self._plan = plan
        self._sample_s = sample_s
        self._random = random.Random(seed)  # noqa: S311 (not used for security)
        self._rates = worker.rates(plan.concurrency)
        self._ttfts_s = worker.ttfts_s(plan.concurrency)
        self._max_waiting = max(FULL_QUEUE_JOBS, FULL_QUEUE_JOBS_PER_WORKER * plan.workers_max)
        self._env = simpy.Environment()
        self._waiting: deque[int] = deque()
        self._running = 0
        self._workers: dict[str, _Worker] = {}
        self._with_room: list[_Worker] = []
        self._idle: dict[str, float] = {}
        self._counts = WorkerCounts(idle=self._idle)
        self._starts: dict[str, float] = {}
        self._next_decision_s = inf
        self._started = 0
        self._ended = 0
        self._counted_until_s = 0.0
        self._done = self._env.event()
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Simulate until the trace's end, and until the last request has its answer."""
        if not self._plan.workers_max and self._trace.arrivals_s:
            raise ValueError("with workers_max=0 no request is ever answered")
        self._env.process(self._arrive())
        if self._sample_s:
            self._env.process(self._sample())
        self._decide_at(0.0)
        self._env.run(self._done)
        self.outcome.ended_s = self._env.now
        if self._env.now < self._trace.duration_s:
            self._env.run(self._trace.duration_s)
        self._count_gpu_time()
        self.outcome.cold_starts = self._started - self._plan.workers_min
        return self.outcome

    # Requests

    def _arrive(self) -> Generator[simpy.Event, None, None]:
        env, waiting = self._env, self._waiting
        for request, arrival_s in enumerate(self._trace.arrivals_s):
            if arrival_s > env.now:
                yield env.timeout(arrival_s - env.now)
            if self._with_room:
                self._start_request(self._random.choice(self._with_room), request)
            elif len(waiting) > self._max_waiting:
                self.outcome.rejected += 1
                self._end_requests(1)
                continue
            else:
                waiting.append(request)
            self.outcome.max_in_flight = max(self.outcome.max_in_flight, self._running + len(waiting))
            self.outcome.max_waiting = max(self.outcome.max_waiting, len(waiting))
            self._decide_at(env.now)
        if not self._trace.arrivals_s:
            self._done.succeed()

    def _start_request(self, worker: _Worker, request: int) -> None:
        """Run a request on a worker that has room."""
        now_s = self._env.now
        self._advance(worker)
        if not worker.ends:
            self._idle.pop(worker.id, None)
        heappush(worker.ends, worker.progress + self._trace.tokens[request])
        self._running += 1
        running = len(worker.ends)
        if running == self._plan.concurrency:
            self._remove_room(worker)
        arrival_s = self._trace.arrivals_s[request]
        self.outcome.ttfts_s.append(now_s - arrival_s + self._ttfts_s[running])
        self.outcome.cold_requests += worker.ready_s > arrival_s
        self._check_at(worker, (worker.ends[0] - worker.progress) / self._rates[running])

    def _advance(self, worker: _Worker) -> None:
        now_s = self._env.now
        worker.progress += (now_s - worker.updated_s) * self._rates[len(worker.ends)]
        worker.updated_s = now_s

    def _check_at(self, worker: _Worker, delay_s: float) -> None:
        """Look for ended requests after a delay, unless that is done before; a check that is too early is repeated."""
        at_s = self._env.now + delay_s
        if at_s < worker.next_end_s:
            worker.next_end_s = at_s
            self._env.timeout(delay_s, worker).callbacks.append(self._check)

    def _check(self, event: simpy.Event) -> None:
        """End the requests of a worker that have all their tokens, and take others."""
        worker = cast("_Worker", event.value)
        if self._env.now < worker.next_end_s:
            return
        worker.next_end_s = inf
        self._advance(worker)
        ends, before = worker.ends, len(worker.ends)
        while ends and ends[0] - worker.progress <= _ROUNDING_TOKENS:
            heappop(ends)
        ended = before - len(ends)
        if ended:
            self._running -= ended
            self._take(worker)
            self._end_requests(ended)
            self._decide_at(self._env.now)
        if ends:
            self._check_at(worker, (ends[0] - worker.progress) / self._rates[len(ends)])

    def _take(self, worker: _Worker) -> None:
        """Take what waits and fits."""
        while self._waiting and len(worker.ends) < self._plan.concurrency:
            self._start_request(worker, self._waiting.popleft())
        if not worker.ends:
            self._idle[worker.id] = self._env.now
        if worker.position < 0 and len(worker.ends) < self._plan.concurrency:
            worker.position = len(self._with_room)
            self._with_room.append(worker)

    def _remove_room(self, worker: _Worker) -> None:
        if worker.position >= 0:
            last = self._with_room.pop()
            if last is not worker:
                self._with_room[worker.position] = last
                last.position = worker.position
            worker.position = -1

    def _end_requests(self, count: int) -> None:
        self._ended += count
        if self._ended == len(self._trace.arrivals_s):
            self._done.succeed()

    def _sample(self) -> Generator[simpy.Event, None, None]:
        while True:
            sample = Sample(self._env.now, len(self._waiting), self._running, self._counts.total)
            self.outcome.samples.append(sample)
            yield self._env.timeout(self._sample_s)

    # Workers

    def _decide_at(self, time_s: float) -> None:
        """Have the scaler decide at its first tick from this time on, unless it does so before."""
        if time_s == inf:
            return
        tick_s = ceil(time_s / TICK_INTERVAL_S - 1e-9) * TICK_INTERVAL_S
        if tick_s < self._next_decision_s:
            self._next_decision_s = tick_s
            self._env.timeout(max(tick_s - self._env.now, 0.0)).callbacks.append(self._decide)

    def _decide(self, _event: simpy.Event) -> None:
        """Start and stop workers as the rules say."""
        if self._env.now < self._next_decision_s - TICK_INTERVAL_S / 2:
            return
        # Not the time that simpy has reached by adding, so that rounding does not delay the decision by a tick.
        now_s, self._next_decision_s = self._next_decision_s, inf
        oldest_s = self._trace.arrivals_s[self._waiting[0]] if self._waiting else now_s
        load = QueueLoad(len(self._waiting), self._running, now_s - oldest_s)
        start, stop = scale(self._plan, load, self._counts, now_s)
        for worker_id in stop:
            self._stop_worker(self._workers[worker_id])
        for _ in range(start):
            self._start_worker(now_s)
        self._decide_at(max(next_change_s(self._plan, load, self._counts, now_s), now_s + TICK_INTERVAL_S))

    def _start_worker(self, now_s: float) -> None:
        self._count_gpu_time()
        self._started += 1
        worker = _Worker(str(self._started), now_s)
        self._workers[worker.id] = worker
        self._starts[worker.id] = worker.started_s
        self._counts.total += 1
        self._counts.usable += 1
        self._counts.starting += 1
        self._counts.last_start_s = now_s
        self.outcome.max_workers = max(self.outcome.max_workers, self._counts.total)
        delay_s = self._random.choice(self._worker.cold_starts_s)
        self._env.timeout(delay_s, worker).callbacks.append(self._on_ready)

    def _on_ready(self, event: simpy.Event) -> None:
        worker = cast("_Worker", event.value)
        worker.ready_s = worker.updated_s = self._env.now
        self._counts.starting -= 1
        self._take(worker)
        self._decide_at(self._env.now)

    def _stop_worker(self, worker: _Worker) -> None:
        """Stop an idle worker: it takes no more, and exits later."""
        self._remove_room(worker)
        del self._idle[worker.id], self._starts[worker.id]
        self._counts.usable -= 1
        if worker.started_s == self._counts.last_start_s:
            self._counts.last_start_s = max(self._starts.values(), default=-inf)
        self._env.timeout(self._worker.stop_s, worker).callbacks.append(self._on_exit)

    def _on_exit(self, event: simpy.Event) -> None:
        worker = cast("_Worker", event.value)
        self._count_gpu_time()
        del self._workers[worker.id]
        self._counts.total -= 1
        self._decide_at(self._env.now)

    def _count_gpu_time(self) -> None:
        """Add the time since the number of workers last changed."""
        seconds = self._env.now - self._counted_until_s
        self._counted_until_s = self._env.now
        self.outcome.gpu_s += seconds * self._counts.total
        self.outcome.active_gpu_s += seconds * min(self._counts.total, self._plan.workers_min)


def simulate(
    worker: WorkerProfile, trace: Trace, plan: EndpointPlan, *, seed: int = 0, sample_s: float = 0.0
) -> Outcome:
    """Run the trace on an endpoint with these settings; `Simulation` explains the arguments."""
    return Simulation(worker, trace, plan, seed=seed, sample_s=sample_s).run()
