"""This worker's performance targets, and whether a run met them.

They are judged here and in no test: whether a test passes must not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.compare import Results
from bench.scenarios import Scenario
from bench.systems import OURS, PEER, VLLM

MIN_ROUNDS = 7


@dataclass(frozen=True)
class Target:
    """A bound on one of this worker's metrics.

    Args:
        description: what is measured.
        measured: the value, None if it was not measured.
        bound: the limit, itself included.
        at_least: whether the bound is a minimum; otherwise it is a maximum.
    """

    description: str
    measured: float | None
    bound: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """`met`, `MISSED` or `not measured`."""
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        return "met" if met else "MISSED"

    def line(self) -> str:
        """Return one line: the verdict, the measured value, the bound and the description."""
        measured = "-" if self.measured is None else f"{self.measured:.3g}"
        sign = "at least" if self.at_least else "at most"
        return f"{self.verdict:12}  {measured:>7}  {sign} {self.bound:g}: {self.description}"


def load_targets(results: Results) -> list[Target]:
    """Return all targets under load; ITL is per token, and ratios and differences are of values of the same round."""
    clients_1, clients_8, clients_24, clients_64 = (Scenario(clients=count) for count in (1, 8, 24, 64))
    latency_40_ms = Scenario(clients=64, latency_ms=40)

    def ratio(scenario: Scenario, metric: str, other: str) -> float | None:
        return results.ratio(scenario, metric, OURS, other)

    def value(scenario: Scenario, metric: str) -> float | None:
        return _median(results.values(scenario, OURS, metric))

    ttft_pairs = results.pairs(clients_8, "ttft_p50_ms", OURS, VLLM)
    added_ttft_ms = _median([ours - vllm for ours, vllm in ttft_pairs])
    streamed = "streamed responses of 64 tokens"
    return [
        Target(
            f"requests/s relative to vLLM alone, 64 clients, {streamed}",
            ratio(clients_64, "requests_per_s", VLLM),
            1.0,
            at_least=True,
        ),
        Target(
            f"requests/s relative to worker-vllm, 64 clients, {streamed}",
            ratio(clients_64, "requests_per_s", PEER),
            3.0,
            at_least=True,
        ),
        Target(
            "requests/s relative to vLLM alone, 64 clients, platform latency 40 ms",
            ratio(latency_40_ms, "requests_per_s", VLLM),
            0.95,
            at_least=True,
        ),
        Target("TTFT p50 relative to worker-vllm, 1 client", ratio(clients_1, "ttft_p50_ms", PEER), 0.15),
        Target("TTFT p50 minus vLLM alone's in ms, 8 clients", added_ttft_ms, 10.0),
        Target("TTFT p95 relative to vLLM alone, 64 clients", ratio(clients_64, "ttft_p95_ms", VLLM), 1.2),
        Target("ITL p95 in ms, 24 clients", value(clients_24, "itl_p95_ms"), 60.0),
        Target("ITL p95 relative to vLLM alone, 24 clients", ratio(clients_24, "itl_p95_ms", VLLM), 1.5),
        Target("inter-chunk latency p95 in ms, 64 clients", value(clients_64, "inter_chunk_p95_ms"), 120.0),
        Target(
            "worker CPU per token relative to worker-vllm, 64 clients",
            ratio(clients_64, "cpu_s_per_1000_tokens", PEER),
            0.35,
        ),
    ]


def cold_start_target(ratios: Sequence[float], model: str, cache: str) -> Target:
    """Return the target for cold starts, from the ratio of each round."""
    return Target(f"cold start relative to worker-vllm, {model} model, {cache} file cache", _median(ratios), 0.6)


def target_lines(targets: Sequence[Target], rounds: int) -> list[str]:
    """Return the targets as lines, under a heading that warns of too few rounds."""
    warning = "" if rounds >= MIN_ROUNDS else f" (only {rounds} rounds; a verdict needs {MIN_ROUNDS})"
    return [f"Targets{warning}", *(f"  {target.line()}" for target in targets)]


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
