"""Interleaved rounds: in each round each scenario is measured on each server, in an order that rotates.

What a machine does beside the measurement drifts over minutes, so servers are compared within a round, and the median
of such ratios is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from bench.clients import closed_loop, open_loop
from bench.metrics import Measurement, measurement, platform_figures
from bench.scenarios import Scenario, poisson_arrivals
from bench.systems import VLLM, Server

_CAPACITY_CLIENTS = 64
_LEAST_ARRIVALS_PER_S = 0.5


@dataclass
class Results:
    """All measurements so far.

    Args:
        rounds: `rounds[scenario][server]` is a list of one measurement a round.
        capacity: requests a second that vLLM alone served, if a scenario has asked for it.
    """

    scenarios: Sequence[Scenario]
    servers: Sequence[str]
    rounds: dict[Scenario, dict[str, list[Measurement]]] = field(default_factory=dict)
    capacity: float | None = None

    def __post_init__(self) -> None:
        for scenario in self.scenarios:
            self.rounds.setdefault(scenario, {server: [] for server in self.servers})

    def values(self, scenario: Scenario, server: str, figure: str) -> list[float]:
        """A figure in each round in which there was one."""
        return [value for it in self._measured(scenario, server) if (value := it.figures.get(figure)) is not None]

    def pairs(self, scenario: Scenario, figure: str, server: str, other: str) -> list[tuple[float, float]]:
        """A figure of two servers in each round in which both have one."""
        both = zip(self._measured(scenario, server), self._measured(scenario, other), strict=False)
        return [
            (one, two)
            for left, right in both
            if (one := left.figures.get(figure)) is not None and (two := right.figures.get(figure)) is not None
        ]

    def ratio(self, scenario: Scenario, figure: str, server: str, other: str) -> float | None:
        """The median over the rounds of one server's figure by the other's; None where there is none."""
        ratios = [one / two for one, two in self.pairs(scenario, figure, server, other) if two]
        return median(ratios) if ratios else None

    def errors(self, scenario: Scenario, server: str) -> dict[str, int]:
        """How many requests failed in which way, over all rounds."""
        found: dict[str, int] = {}
        for it in self._measured(scenario, server):
            for kind, count in it.errors.items():
                found[kind] = found.get(kind, 0) + count
        return found

    def _measured(self, scenario: Scenario, server: str) -> list[Measurement]:
        return self.rounds.get(scenario, {}).get(server, [])


async def compare(
    servers: Sequence[Server],
    scenarios: Sequence[Scenario],
    rounds: int,
    seconds: float,
    after_round: Callable[[Results, int], None],
) -> Results:
    """Measure all scenarios on all servers, so many times.

    Args:
        servers: those that are ready.
        scenarios: what to measure.
        rounds: how many times.
        seconds: how long requests are sent in one measurement; with many clients it is longer (`Scenario.lasts_s`).
        after_round: is given what there is after each round, and how many rounds it was.
    """
    results = Results(scenarios, [server.name for server in servers])
    for server in servers:
        await _measure(server, Scenario(clients=8, tokens=16), 1.0, 0.0, "")
    alone = next((server for server in servers if server.name == VLLM), None)
    if alone is not None and any(scenario.load for scenario in scenarios):
        most = Scenario(clients=_CAPACITY_CLIENTS)
        found = await _measure(alone, most, most.lasts_s(seconds), 0.0, "")
        results.capacity = found.figures["requests_per_s"]
    for number in range(rounds):
        for scenario in scenarios:
            first = number % len(servers)
            for server in (*servers[first:], *servers[:first]):
                rate = max(scenario.load * (results.capacity or 0.0), _LEAST_ARRIVALS_PER_S)
                lasts_s = scenario.lasts_s(seconds)
                found = await _measure(server, scenario, lasts_s, rate, f"{scenario.name}/{number}")
                results.rounds[scenario][server.name].append(found)
        after_round(results, number + 1)
    return results


async def _measure(server: Server, scenario: Scenario, seconds: float, rate: float, seed: str) -> Measurement:
    """One server under one load once; `rate` and `seed` are an open loop's."""
    if server.platform is not None:
        server.platform.set_latency(scenario.latency_ms)
    since = time.time()
    begun_s, server_cpu_s, client_cpu_s = time.monotonic(), server.cpu_s(), time.process_time()
    if scenario.clients:
        exchanges = await closed_loop(server.address, scenario.body(), scenario.clients, seconds)
    else:
        exchanges = await open_loop(server.address, scenario.body(), poisson_arrivals(rate, seconds, seed))
    server_cpu_s, client_cpu_s = server.cpu_s() - server_cpu_s, time.process_time() - client_cpu_s
    elapsed_s = time.monotonic() - begun_s
    # Only now, when nothing is measured any more, is the answers' text looked at.
    found = measurement(exchanges, scenario)
    made_tokens = (found.figures["requests"] or 0) * scenario.tokens
    found.figures |= {
        "client_cpu": client_cpu_s / elapsed_s,
        "cpu_s_per_1000_tokens": 1000 * server_cpu_s / made_tokens if made_tokens else None,
        "memory_mib": server.memory_mib(),
    }
    if server.platform is not None:
        jobs = [job for job in server.platform.state()["jobs"] if job["submittedAt"] >= since]
        found.figures |= platform_figures(jobs, scenario)
    return found
