"""Try settings on a trace: what each one costs and how long its users wait, and the cheapest that meets a goal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from bench.advisor.simulation import EndpointPlan, Outcome, simulate
from bench.advisor.trace import Trace
from bench.advisor.worker_profile import WorkerProfile
from bench.metrics import percentile

SHARES = (50, 95, 99)
# RunPod's API refuses an idle timeout for REQUEST_COUNT on a queue endpoint and does not say what it does instead; this
# is the console's default (docs.runpod.io, "Endpoint settings").
REQUEST_COUNT_IDLE_S = 5.0


@dataclass(frozen=True)
class Prices:
    """What a worker costs in USD an hour. `active` is that of the workers that `workersMin` keeps."""

    flex: float
    active: float

    def money(self, outcome: Outcome) -> float:
        """Return what a run costs, in USD."""
        return (self.active * outcome.active_gpu_s + self.flex * (outcome.gpu_s - outcome.active_gpu_s)) / 3600


@dataclass(frozen=True)
class Goal:
    """So many percent of the requests must have their first token within so many seconds, and none may be refused."""

    share: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """Settings and what came of them.

    Args:
        plan: the settings.
        ttft_s: percentiles of the time to first token in seconds, by share.
        money: in USD; None without prices.
        outcome: everything else.
    """

    plan: EndpointPlan
    ttft_s: dict[int, float]
    money: float | None
    outcome: Outcome

    @property
    def cost(self) -> float:
        """By what results are compared: money, or GPU seconds without prices."""
        return self.outcome.gpu_s if self.money is None else self.money

    def meets(self, goal: Goal) -> bool:
        """Return whether the goal is met."""
        return not self.outcome.rejected and self.ttft_s[goal.share] <= goal.seconds


@dataclass(frozen=True)
class Grid:
    """The settings to try: every combination. `concurrency` is the worker's MAX_CONCURRENCY."""

    queue_delays_s: Sequence[float] = (1.0, 4.0)
    request_counts: Sequence[float] = (1.0, 4.0, 16.0)
    concurrency: Sequence[int] = (8,)
    idle_timeouts_s: Sequence[float] = (5.0, 60.0, 300.0)
    workers_min: Sequence[int] = (0, 1, 2)
    workers_max: Sequence[int] = (3, 10)

    def plans(self) -> Iterator[EndpointPlan]:
        """Yield each combination that a platform accepts."""
        scalers: list[tuple[str, float, float]] = [
            *(("QUEUE_DELAY", value, idle_s) for value, idle_s in product(self.queue_delays_s, self.idle_timeouts_s)),
            *(("REQUEST_COUNT", value, REQUEST_COUNT_IDLE_S) for value in self.request_counts),
        ]
        for (scaler, value, idle_s), concurrency, minimum, maximum in product(
            scalers, self.concurrency, self.workers_min, self.workers_max
        ):
            if minimum <= maximum:
                yield EndpointPlan(scaler, value, concurrency, idle_s, minimum, maximum)


@dataclass
class Search:
    """Runs plans on one trace.

    Args:
        worker: the worker's figures.
        trace: the requests.
        prices: what workers cost; None if that is not known.
        seed: of the simulation.
        on_result: is called after each run.
    """

    worker: WorkerProfile
    trace: Trace
    prices: Prices | None = None
    seed: int = 0
    on_result: Callable[[Result], None] = lambda _: None
    results: list[Result] = field(default_factory=list)

    def run(self, plans: Iterable[EndpointPlan]) -> list[Result]:
        """Simulate each plan; return all results so far."""
        for plan in plans:
            result = to_result(plan, simulate(self.worker, self.trace, plan, seed=self.seed), self.prices)
            self.results.append(result)
            self.on_result(result)
        return self.results


def to_result(plan: EndpointPlan, outcome: Outcome, prices: Prices | None = None) -> Result:
    """Return the percentiles and the price of a run; the outcome's list of times is dropped, which is long."""
    ttfts_s = sorted(outcome.ttfts_s) or [0.0]
    outcome.ttfts_s = []
    ttft_s = {share: percentile(ttfts_s, share / 100) for share in SHARES}
    return Result(plan, ttft_s, None if prices is None else prices.money(outcome), outcome)


def cheapest(results: Iterable[Result], goal: Goal) -> Result | None:
    """Return the cheapest result that meets the goal; of equally cheap ones the one with the shorter wait."""
    return min(
        (result for result in results if result.meets(goal)),
        key=lambda result: (result.cost, result.ttft_s[goal.share]),
        default=None,
    )


def frontier(results: Iterable[Result], share: int) -> list[Result]:
    """Return the results to which no other is both cheaper and quicker, cheapest first; without those that refuse."""
    found: list[Result] = []
    for result in sorted(results, key=lambda result: (result.cost, result.ttft_s[share])):
        if not result.outcome.rejected and (not found or result.ttft_s[share] < found[-1].ttft_s[share]):
            found.append(result)
    return found
