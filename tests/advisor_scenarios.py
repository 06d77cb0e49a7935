"""Twelve endpoints under load, small enough to run each in the emulator, with which the simulation is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.advisor.simulation import EndpointPlan, Outcome
from bench.advisor.trace import MadeUpDay, TokenCounts, Trace
from bench.advisor.worker_profile import WorkerProfile
from bench.metrics import percentile

# phi-4's shape in 4 bits on an H100 (docs/performance.md): 1 and 32 clients, and a start with warm caches.
PHI_4 = WorkerProfile({1: 105.0, 32: 1165.0}, {1: 0.038, 32: 0.110}, (41.0,))
SLOW = WorkerProfile({1: 30.0, 4: 90.0, 8: 120.0}, {1: 0.2, 8: 0.9}, (80.0, 112.0), stop_s=2.0)
TOKENS = TokenCounts(300)


@dataclass(frozen=True)
class Scenario:
    """A trace, an endpoint and its workers."""

    trace: Trace
    plan: EndpointPlan
    worker: WorkerProfile = PHI_4


def _burst(requests: int, at_s: float, within_s: float, duration_s: float) -> Trace:
    arrivals_s = [at_s + within_s * number / requests for number in range(requests)]
    return Trace(arrivals_s, TOKENS.sample(requests), duration_s)


def _steady(requests: int, duration_s: float) -> Trace:
    return MadeUpDay(requests, peak=1.0, bursts=0, duration_s=duration_s).trace(TOKENS)


_DIURNAL = MadeUpDay(2000, duration_s=14_400).trace(TOKENS)
_ZERO_TO_ONE = Trace([10.0], [300], 120.0)

SCENARIOS: Mapping[str, Scenario] = {
    "zero to one, QUEUE_DELAY": Scenario(_ZERO_TO_ONE, EndpointPlan("QUEUE_DELAY", 4, 8)),
    "zero to one, REQUEST_COUNT": Scenario(_ZERO_TO_ONE, EndpointPlan("REQUEST_COUNT", 1, 8)),
    "steady, QUEUE_DELAY": Scenario(_steady(600, 1200), EndpointPlan("QUEUE_DELAY", 4, 4, workers_min=1)),
    "steady, REQUEST_COUNT": Scenario(_steady(600, 1200), EndpointPlan("REQUEST_COUNT", 4, 8, 60)),
    "burst from zero, QUEUE_DELAY": Scenario(
        _burst(300, 5, 10, 300), EndpointPlan("QUEUE_DELAY", 4, 16, workers_max=5)
    ),
    "burst from zero, REQUEST_COUNT": Scenario(
        _burst(300, 5, 10, 300), EndpointPlan("REQUEST_COUNT", 16, 16, workers_max=5)
    ),
    "burst on an active worker": Scenario(
        _burst(300, 60, 10, 600), EndpointPlan("QUEUE_DELAY", 1, 16, 30, workers_min=1, workers_max=4)
    ),
    "diurnal, QUEUE_DELAY": Scenario(_DIURNAL, EndpointPlan("QUEUE_DELAY", 4, 2, 60, workers_max=6)),
    "diurnal, REQUEST_COUNT": Scenario(_DIURNAL, EndpointPlan("REQUEST_COUNT", 2, 2, 60, workers_max=6)),
    "overload": Scenario(_steady(500, 600), EndpointPlan("QUEUE_DELAY", 4, 8, workers_max=2), SLOW),
    "one at a time, rarely": Scenario(
        Trace([45.0 * number for number in range(40)], [200] * 40, 1800.0), EndpointPlan("QUEUE_DELAY", 2, 8, 5)
    ),
    "queue full": Scenario(
        _burst(900, 5, 5, 300), EndpointPlan("REQUEST_COUNT", 8, 8, workers_min=1, workers_max=1), SLOW
    ),
}


def ttft_s(outcome: Outcome, share: int = 95) -> float:
    """Return a percentile of the time to first token."""
    return percentile(sorted(outcome.ttfts_s), share / 100)
