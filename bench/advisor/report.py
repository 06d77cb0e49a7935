"""What the search has found, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.advisor.search import Goal, Result, frontier
from bench.advisor.trace import Trace
from bench.advisor.worker_profile import NO_TTFT_S, WorkerProfile
from bench.report import format_number

# A trace that lasts less than so many cold starts shows the start of an endpoint more than its operation.
_MIN_STARTS = 20
_COLUMNS = (
    "scalerType", "value", "MAX_CONC.", "idle, s", "min", "max", "p50, s", "p95, s", "p99, s", "cold starts",
    "cold requests", "refused", "GPU hours", "USD",
)  # fmt: skip


def render(  # noqa: PLR0913 (all that is said)
    results: Sequence[Result],
    goal: Goal,
    best: Result | None,
    worker: WorkerProfile,
    trace: Trace,
    *,
    everything: bool = False,
) -> str:
    """Return for people a table of the frontier, or of all settings, and the cheapest that meets the goal."""
    shown = sorted(results, key=lambda result: result.cost) if everything else frontier(results, goal.share)
    lines = [
        f"{_size(trace)}; {len(results)} settings tried",
        "",
        *_table([_COLUMNS, *(_row(result) for result in shown)]),
        "",
        *_warnings(results, worker, trace),
        f"Goal: time to first token p{goal.share} of at most {goal.seconds:g} s, and no request refused.",
    ]
    fastest_s = min(worker.ttft_s.values())
    if best is None and goal.seconds < fastest_s:
        lines.append(f"No settings can: the worker alone takes {format_number(fastest_s)} s to its first token.")
    elif best is None:
        lines.append("No settings meet it. Try more workers, a larger workersMin, or a shorter cold start.")
    else:
        plan = best.plan
        idle = f", idleTimeout={plan.idle_timeout_s:g}" if plan.scaler_type == "QUEUE_DELAY" else ""
        lines.append(
            f"Cheapest: scalerType={plan.scaler_type}, scalerValue={plan.scaler_value:g}{idle}, "
            f"workersMin={plan.workers_min}, workersMax={plan.workers_max}, MAX_CONCURRENCY={plan.concurrency}"
        )
    return "\n".join(lines) + "\n"


def _size(trace: Trace) -> str:
    count, tokens = len(trace.arrivals_s), sum(trace.tokens) / max(len(trace.tokens), 1)
    return (
        f"{count} request{'s' if count != 1 else ''} in {_as_text(trace.duration_s)}, "
        f"{format_number(tokens)} tokens each on average"
    )


def _as_text(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    for unit, length_s in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length_s:
            return f"{format_number(seconds / length_s)} {unit}"
    return f"{format_number(seconds)} s"


def _warnings(results: Sequence[Result], worker: WorkerProfile, trace: Trace) -> list[str]:
    """Return what makes the figures doubtful."""
    found = []
    if worker.ttft_s == NO_TTFT_S:
        found.append("The worker's time to first token is not known and counts as 0: give --ttft-ms.")
    start_s = max(worker.cold_starts_s)
    if trace.duration_s < _MIN_STARTS * start_s and any(result.plan.workers_min for result in results):
        found.append(
            f"The requests last {_as_text(trace.duration_s)}, a cold start {_as_text(start_s)}: workers of workersMin "
            "start with the first request, and so look slower than they are. Give requests of some hours."
        )
    return found


def _row(result: Result) -> tuple[str, ...]:
    plan, outcome = result.plan, result.outcome
    return (
        plan.scaler_type,
        f"{plan.scaler_value:g}",
        str(plan.concurrency),
        f"{plan.idle_timeout_s:g}" if plan.scaler_type == "QUEUE_DELAY" else "-",
        str(plan.workers_min),
        str(plan.workers_max),
        *(format_number(seconds) for seconds in result.ttft_s.values()),
        str(outcome.cold_starts),
        str(outcome.cold_requests),
        str(outcome.rejected),
        format_number(outcome.gpu_s / 3600),
        "-" if result.money is None else f"{result.money:.2f}",
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def to_document(
    results: Sequence[Result], goal: Goal, best: Result | None, worker: WorkerProfile, trace: Trace
) -> dict[str, Any]:
    """Return everything as a JSON document; times in seconds, money in USD."""
    return {
        "worker": asdict(worker),
        "trace": {"requests": len(trace.arrivals_s), "tokens": sum(trace.tokens), "duration_s": trace.duration_s},
        "goal": asdict(goal),
        "cheapest": None if best is None else asdict(best.plan),
        "results": [_result_document(result) for result in results],
    }


def _result_document(result: Result) -> dict[str, Any]:
    outcome = asdict(result.outcome)
    for name in ("ttfts_s", "samples"):
        del outcome[name]
    ttft_s = {f"ttft_p{share}_s": seconds for share, seconds in result.ttft_s.items()}
    return {**asdict(result.plan), **ttft_s, **outcome, "money_usd": result.money}
