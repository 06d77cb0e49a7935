"""What this worker is to reach, and whether it has. Judged here and in no test: a test must not depend on a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.compare import Results
from bench.scenarios import Scenario
from bench.systems import OURS, PEER, VLLM

LEAST_ROUNDS = 7


@dataclass(frozen=True)
class Target:
    """A bound on a figure of this worker.

    Args:
        text: what is asked for.
        found: the figure, None where it was not measured.
        limit: its bound.
        at_least: whether the bound is the least value; otherwise it is the greatest.
    """

    text: str
    found: float | None
    limit: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """`reached`, `NOT REACHED` or `not measured`."""
        if self.found is None:
            return "not measured"
        reached = self.found >= self.limit if self.at_least else self.found <= self.limit
        return "reached" if reached else "NOT REACHED"

    def line(self) -> str:
        """The verdict, what was found and what is asked for."""
        found = "-" if self.found is None else f"{self.found:.3g}"
        sign = "at least" if self.at_least else "at most"
        return f"{self.verdict:12}  {found:>7}  {sign} {self.limit:g}: {self.text}"


def speed_targets(results: Results) -> list[Target]:
    """All targets but the cold start's; ITL is per token, and ratios and differences are paired by round."""
    one, eight, many, most = (Scenario(clients=count) for count in (1, 8, 24, 64))
    far = Scenario(clients=64, latency_ms=40)

    def ratio(scenario: Scenario, figure: str, other: str) -> float | None:
        return results.ratio(scenario, figure, OURS, other)

    def own(scenario: Scenario, figure: str) -> float | None:
        return _median(results.values(scenario, OURS, figure))

    later_ms = _median([ours - vllm for ours, vllm in results.pairs(eight, "ttft_p50_ms", OURS, VLLM)])
    streamed = "streamed answers of 64 tokens"
    return [
        Target(
            f"requests/s by vLLM alone's, 64 clients, {streamed}",
            ratio(most, "requests_per_s", VLLM),
            1.0,
            at_least=True,
        ),
        Target(
            f"requests/s by worker-vllm's, 64 clients, {streamed}",
            ratio(most, "requests_per_s", PEER),
            3.0,
            at_least=True,
        ),
        Target(
            "the same by vLLM alone's, platform 40 ms away", ratio(far, "requests_per_s", VLLM), 0.95, at_least=True
        ),
        Target("TTFT p50 by worker-vllm's, 1 client", ratio(one, "ttft_p50_ms", PEER), 0.15),
        Target("ms of TTFT p50 above vLLM alone's, 8 clients", later_ms, 10.0),
        Target("TTFT p95 by vLLM alone's, 64 clients", ratio(most, "ttft_p95_ms", VLLM), 1.2),
        Target("ms of ITL p95, 24 clients", own(many, "itl_p95_ms"), 60.0),
        Target("ITL p95 by vLLM alone's, 24 clients", ratio(many, "itl_p95_ms", VLLM), 1.5),
        Target("deliveries per output token, 24 clients", own(many, "deliveries_per_token"), 0.08),
        Target(
            "worker process CPU per token by worker-vllm's, 64 clients",
            ratio(most, "cpu_s_per_1000_tokens", PEER),
            0.35,
        ),
    ]


def cold_target(ratios: Sequence[float], model: str, cache: str) -> Target:
    """The cold start's target, from the ratio of each round."""
    return Target(f"start by worker-vllm's, {model} model, {cache} file cache", _median(ratios), 0.6)


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def lines(targets: Sequence[Target], rounds: int) -> list[str]:
    """The targets as lines, with a warning where there were too few rounds to tell."""
    few = "" if rounds >= LEAST_ROUNDS else f" (only {rounds} rounds; {LEAST_ROUNDS} are needed to tell)"
    return [f"Targets{few}", *(f"  {target.line()}" for target in targets)]
