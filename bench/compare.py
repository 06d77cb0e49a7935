"""Interleaved rounds: each round measures each scenario on each system, in an order that rotates.

A machine's speed drifts over minutes, so systems are compared within a round, and the reported ratio is the median of
the rounds' ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from bench.clients import closed_loop, open_loop
from bench.metrics import Measurement, platform_metrics, summarize
from bench.scenarios import Scenario, poisson_arrivals
from bench.systems import VLLM, SystemUnderTest

_CAPACITY_CLIENTS = 64
_MIN_ARRIVALS_PER_S = 0.5


@dataclass
class Results:
    """All measurements so far.

    Args:
        scenarios: the measured scenarios.
        systems: the names of the measured systems.
        rounds: `rounds[scenario][system]` is a list of one measurement per round.
        capacity_requests_per_s: what vLLM alone served, if a scenario depends on it.
    """

    scenarios: Sequence[Scenario]
    systems: Sequence[str]
    rounds: dict[Scenario, dict[str, list[Measurement]]] = field(default_factory=dict)
    capacity_requests_per_s: float | None = None

    def __post_init__(self) -> None:
        for scenario in self.scenarios:
            self.rounds.setdefault(scenario, {system: [] for system in self.systems})

    def values(self, scenario: Scenario, system: str, metric: str) -> list[float]:
        """Return a metric of each round that has it."""
        return [value for it in self._measurements(scenario, system) if (value := it.metrics.get(metric)) is not None]

    def pairs(self, scenario: Scenario, metric: str, system: str, other: str) -> list[tuple[float, float]]:
        """Return a metric of two systems of each round in which both have it."""
        both = zip(self._measurements(scenario, system), self._measurements(scenario, other), strict=False)
        return [
            (one, two)
            for left, right in both
            if (one := left.metrics.get(metric)) is not None and (two := right.metrics.get(metric)) is not None
        ]

    def ratio(self, scenario: Scenario, metric: str, system: str, other: str) -> float | None:
        """Return the median of the rounds' ratios of one system's metric to the other's; None if there are none."""
        ratios = [one / two for one, two in self.pairs(scenario, metric, system, other) if two]
        return median(ratios) if ratios else None

    def errors(self, scenario: Scenario, system: str) -> dict[str, int]:
        """Return the number of failed requests by kind, over all rounds."""
        total: dict[str, int] = {}
        for measurement in self._measurements(scenario, system):
            for kind, count in measurement.errors.items():
                total[kind] = total.get(kind, 0) + count
        return total

    def _measurements(self, scenario: Scenario, system: str) -> list[Measurement]:
        return self.rounds.get(scenario, {}).get(system, [])


async def compare(
    systems: Sequence[SystemUnderTest],
    scenarios: Sequence[Scenario],
    rounds: int,
    seconds: float,
    after_round: Callable[[Results, int], None],
) -> Results:
    """Measure all scenarios on all systems, once per round.

    Args:
        systems: the systems that are ready.
        scenarios: what to measure.
        rounds: the number of rounds.
        seconds: for how long requests are sent in one measurement; longer with many clients (`Scenario.duration_s`).
        after_round: called after each round with the results so far and the number of complete rounds.
    """
    results = Results(scenarios, [system.name for system in systems])
    for system in systems:
        await _measure(system, Scenario(clients=8, tokens=16), 1.0, 0.0, "")
    vllm = next((system for system in systems if system.name == VLLM), None)
    if vllm is not None and any(scenario.capacity_share for scenario in scenarios):
        saturated = Scenario(clients=_CAPACITY_CLIENTS)
        measured = await _measure(vllm, saturated, saturated.duration_s(seconds), 0.0, "")
        results.capacity_requests_per_s = measured.metrics["requests_per_s"]
    for number in range(rounds):
        for scenario in scenarios:
            first = number % len(systems)
            for system in (*systems[first:], *systems[:first]):
                rate = max(scenario.capacity_share * (results.capacity_requests_per_s or 0.0), _MIN_ARRIVALS_PER_S)
                duration_s = scenario.duration_s(seconds)
                measured = await _measure(system, scenario, duration_s, rate, f"{scenario.name}/{number}")
                results.rounds[scenario][system.name].append(measured)
        after_round(results, number + 1)
    return results


async def _measure(system: SystemUnderTest, scenario: Scenario, seconds: float, rate: float, seed: str) -> Measurement:
    """Measure one system under one load once; `rate` and `seed` are used only for an open loop."""
    if system.platform is not None:
        system.platform.set_latency(scenario.latency_ms)
    since = time.time()
    start_s, worker_cpu_s, client_cpu_s = time.monotonic(), system.worker_cpu_s(), time.process_time()
    if scenario.clients:
        traces = await closed_loop(system.address, scenario.body(), scenario.clients, seconds)
    else:
        traces = await open_loop(system.address, scenario.body(), poisson_arrivals(rate, seconds, seed))
    worker_cpu_s, client_cpu_s = system.worker_cpu_s() - worker_cpu_s, time.process_time() - client_cpu_s
    elapsed_s = time.monotonic() - start_s
    # Responses are parsed only now, so that parsing takes no CPU during the measurement.
    measurement = summarize(traces, scenario)
    tokens = (measurement.metrics["requests"] or 0) * scenario.tokens
    measurement.metrics |= {
        "client_cpu_cores": client_cpu_s / elapsed_s,
        "cpu_s_per_1000_tokens": 1000 * worker_cpu_s / tokens if tokens else None,
        "memory_mib": system.memory_mib(),
    }
    if system.platform is not None:
        jobs = [job for job in system.platform.state()["jobs"] if job["submittedAt"] >= since]
        measurement.metrics |= platform_metrics(jobs, scenario)
    return measurement
