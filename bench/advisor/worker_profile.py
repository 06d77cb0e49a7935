"""What is known of a worker: its throughput and time to first token by concurrency, and its cold start.

It comes from reports of `python -m bench` (`results.json`, `gpu.json`, `cold-*.json`), from a worker's log, or from the
command line; later sources replace what earlier ones said.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.advisor.errors import InputError
from bench.advisor.worker_log import WorkerLog
from bench.systems import OURS

# Of a worker whose time to first token is not known.
NO_TTFT_S: Mapping[int, float] = {1: 0.0}


@dataclass(frozen=True)
class WorkerProfile:
    """A worker's measured figures.

    Args:
        tokens_per_s: output tokens a second of all requests together, by the number of requests that run at once.
        ttft_s: time from the take to the first token, in seconds, by the same number.
        cold_starts_s: measured durations from a worker's start until it takes jobs; a start lasts as one of them.
        stop_s: from a stop signal to the exit of an idle worker. Such a worker takes no job, and is paid for.
    """

    tokens_per_s: Mapping[int, float]
    ttft_s: Mapping[int, float] = field(default_factory=lambda: NO_TTFT_S)
    cold_starts_s: Sequence[float] = (60.0,)
    stop_s: float = 1.0

    def rates(self, concurrency: int) -> list[float]:
        """Return tokens a second for each request, for 0 to `concurrency` requests at once (0 for none).

        The throughput is interpolated between measured points. Before the first point each request is as quick as
        there, behind the last one the throughput stays.
        """
        first = min(self.tokens_per_s)
        rates = [0.0]
        for count in range(1, concurrency + 1):
            total = interpolate(self.tokens_per_s, count)
            rates.append(total / max(count, first))
        return rates

    def ttfts_s(self, concurrency: int) -> list[float]:
        """Return the time to first token of a request that is the n-th to run, for 0 to `concurrency`."""
        return [0.0] + [interpolate(self.ttft_s, count) for count in range(1, concurrency + 1)]


def interpolate(points: Mapping[int, float], at: int) -> float:
    """Return the value at a position: linear between two points, constant outside."""
    positions = sorted(points)
    right = bisect_left(positions, at)
    if right == 0:
        return points[positions[0]]
    if right == len(positions):
        return points[positions[-1]]
    low, high = positions[right - 1], positions[right]
    share = (at - low) / (high - low)
    return points[low] + share * (points[high] - points[low])


@dataclass
class Figures:
    """Figures as the sources give them: by concurrency, and of starts; each value in seconds or tokens a second."""

    tokens_per_s: dict[int, float] = field(default_factory=dict)
    ttft_s: dict[int, float] = field(default_factory=dict)
    cold_starts_s: list[float] = field(default_factory=list)

    def profile(self, stop_s: float) -> WorkerProfile:
        """Return the profile.

        Raises:
            InputError: throughput or cold start are not known.
        """
        if not self.tokens_per_s:
            raise InputError("the worker's throughput is not known: give --report, --worker-log or --throughput")
        if not self.cold_starts_s:
            raise InputError("the worker's cold start is not known: give --report cold-….json or --cold-start SECONDS")
        return WorkerProfile(self.tokens_per_s, self.ttft_s or NO_TTFT_S, tuple(self.cold_starts_s), stop_s)

    def read_report(self, path: Path) -> None:
        """Add what a report of `python -m bench` says of this worker.

        Raises:
            InputError: it is none, or says nothing of this worker.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        try:
            found = self._add_report(document)
        except (AttributeError, KeyError, TypeError, IndexError):
            found = False
        if not found:
            raise InputError(
                f"{path} has no figures of {OURS!r}: give results.json, gpu.json or cold-….json of `python -m bench`"
            )

    def _add_report(self, document: Mapping[str, Any]) -> bool:
        """Add what the document has; return whether that was anything."""
        if starts := [start["first_token_s"] for start in document.get("starts", {}).get(OURS, []) if start]:
            self.cold_starts_s = starts
            return True
        found = [self._add_scenarios(document.get("scenarios", []))]
        for stage in document.get("stages", []):
            figures = stage["figures"]
            if stage["stage"] == "load":
                found.append(self._add_scenarios(figures.get("scenarios", [])))
            if stage["stage"] == "warm-start" and "start" in figures:
                self.cold_starts_s = [figures["start"]["first_token_s"]]
                found.append(True)
        return any(found)

    def _add_scenarios(self, scenarios: Sequence[Mapping[str, Any]]) -> bool:
        """Add the closed loops of streams without added latency, as many clients as each has."""
        found = False
        for scenario in scenarios:
            rounds = scenario["systems"].get(OURS, [])
            if not (scenario["clients"] and scenario["streamed"]) or scenario["latency_ms"] or scenario["token_ids"]:
                continue
            values = {
                name: [value for one in rounds if (value := one["metrics"].get(name)) is not None]
                for name in ("tokens_per_s", "ttft_p50_ms")
            }
            if all(values.values()):
                self.tokens_per_s[scenario["clients"]] = median(values["tokens_per_s"])
                self.ttft_s[scenario["clients"]] = median(values["ttft_p50_ms"]) / 1000
                found = True
        return found

    def read_log(self, log: WorkerLog) -> None:
        """Add what a worker's log shows.

        Raises:
            InputError: it has no job whose tokens are known.
        """
        tokens_per_s, ttft_s = log.by_concurrency()
        if not tokens_per_s:
            raise InputError(f"{log.path} has no line of a completed job with tokens_out: is it a worker's log?")
        self.tokens_per_s |= tokens_per_s
        self.ttft_s |= ttft_s
        if log.cold_starts_s:
            self.cold_starts_s = log.cold_starts_s
