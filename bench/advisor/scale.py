"""`python -m bench.advisor.scale DIR`: a million requests a day on 10, 100 and 1,000 workers, for docs/scaling.md.

It writes a plot to DIR and prints a Markdown table. Answers and workers differ, so that the same day needs about 5, 50
and 500 of them at its peak. Each line is a million simulated requests; all of them take one to two minutes.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.advisor import plots
from bench.advisor.search import Result, to_result
from bench.advisor.simulation import EndpointPlan, Sample, simulate
from bench.advisor.trace import MadeUpDay, TokenCounts
from bench.advisor.worker_profile import WorkerProfile
from bench.report import format_number, print_progress

REQUESTS = 1_000_000
_SAMPLE_S = 240.0
_HEADINGS = (
    "workers", "settings", "p50, s", "p95, s", "p99, s", "most waiting", "in flight, median", "refused", "starts",
    "most workers", "GPU hours", "simulated in",
)  # fmt: skip


@dataclass(frozen=True)
class Service:
    """A model on a kind of worker, and the answers that it gives.

    Args:
        workers: maximum of workers; about twice as many as the day's peak needs.
        tokens: mean output tokens of an answer.
        concurrency: MAX_CONCURRENCY.
        worker: figures of a worker.
    """

    workers: int
    tokens: int
    concurrency: int
    worker: WorkerProfile


# The first is the 3B shape of docs/performance.md on an H100 (responses of 128 tokens), the second phi-4's shape in 4
# bits there. The third is the second one with long answers, as of a model that reasons.
_THREE_B = WorkerProfile({1: 283.0, 8: 2200.0, 64: 10_870.0}, {1: 0.027, 8: 0.047, 64: 0.138}, (41.0,))
_PHI_4 = WorkerProfile({1: 105.0, 32: 1165.0}, {1: 0.038, 32: 0.110}, (41.0,))
SERVICES = (
    Service(10, 2500, 64, _THREE_B),
    Service(100, 3000, 32, _PHI_4),
    Service(1000, 30_000, 32, _PHI_4),
)


def plans(service: Service) -> Mapping[str, EndpointPlan]:
    """Return the settings that are compared."""
    workers, concurrency = service.workers, service.concurrency
    return {
        "QUEUE_DELAY 4 s": EndpointPlan("QUEUE_DELAY", 4, concurrency, 60, 0, workers),
        "QUEUE_DELAY 0.5 s": EndpointPlan("QUEUE_DELAY", 0.5, concurrency, 60, 0, workers),
        "REQUEST_COUNT": EndpointPlan("REQUEST_COUNT", concurrency * 3 // 4, concurrency, 5, workers // 10, workers),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.advisor.scale", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="of million.svg")
    directory: Path = parser.parse_args(argv).directory
    lines = [f"| {' | '.join(_HEADINGS)} |", f"|{' --- |' * len(_HEADINGS)}"]
    timelines: dict[str, dict[str, Sequence[Sample]]] = {}
    for service in SERVICES:
        trace = MadeUpDay(REQUESTS).trace(TokenCounts(service.tokens))
        title = f"{service.workers:,} workers, {service.tokens:,} tokens a request"
        for name, plan in plans(service).items():
            started_s = time.process_time()
            result = to_result(plan, simulate(service.worker, trace, plan, sample_s=_SAMPLE_S))
            seconds = time.process_time() - started_s
            timelines.setdefault(title, {})[name] = result.outcome.samples
            lines.append(_row(service, name, result, seconds))
            print_progress(lines[-1])
    plots.write_timelines(timelines, directory / "million.svg")
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write("\n".join(lines) + f"\n\nPeak memory of this process: {peak_mib:.0f} MiB\n")
    return 0


def _row(service: Service, name: str, result: Result, seconds: float) -> str:
    outcome = result.outcome
    cells = [
        f"{service.workers:,}",
        name,
        *(format_number(ttft_s) for ttft_s in result.ttft_s.values()),
        f"{outcome.max_waiting:,}",
        f"{median(sample.waiting + sample.running for sample in outcome.samples):,.0f}",
        f"{outcome.rejected:,}",
        f"{outcome.cold_starts:,}",
        f"{outcome.max_workers:,}",
        f"{outcome.gpu_s / 3600:,.0f}",
        f"{seconds:.1f} s",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
