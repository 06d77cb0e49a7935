"""`python -m bench advise`: which settings of an endpoint are the cheapest that keep its users' waiting time.

A worker's measured figures and a day of requests are simulated with each combination of settings, by the scaling rules
of the emulator. Nothing is started or measured: it takes a second for ten thousand requests and ten settings.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import report
from bench.advisor import plots
from bench.advisor.errors import InputError
from bench.advisor.search import SHARES, Goal, Grid, Prices, Result, Search, cheapest, frontier
from bench.advisor.simulation import EndpointPlan
from bench.advisor.trace import DAY_S, MadeUpDay, TokenCounts, Trace, read_csv, read_worker_log
from bench.advisor.worker_log import WorkerLog
from bench.advisor.worker_profile import NO_TTFT_S, Figures, WorkerProfile
from bench.report import format_number, print_progress

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}
_PROGRESS_S = 5.0
# Of tokens a second, or of milliseconds to the first: what is beyond is a mistake, and would take for ever.
_MIN_RATE, _MAX_RATE = 0.001, 1e7
_MAX_CONCURRENCY = 10_000
# A trace that lasts less than so many cold starts shows the start of an endpoint more than its operation.
_MIN_STARTS = 20
_COLUMNS = (
    "scalerType", "value", "MAX_CONC.", "idle, s", "min", "max", "p50, s", "p95, s", "p99, s", "cold starts",
    "cold requests", "refused", "GPU hours", "USD",
)  # fmt: skip


def add_options(result: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    worker = result.add_argument_group("the worker's figures; what is given last counts")
    worker.add_argument(
        "--report",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="results.json, gpu.json or cold-….json of this program",
    )
    worker.add_argument("--worker-log", type=Path, metavar="FILE", help="the log of one worker")
    worker.add_argument(
        "--throughput",
        type=_point,
        nargs="+",
        default=[],
        metavar="N=TOKENS_PER_S",
        help="output tokens a second of N requests together",
    )
    worker.add_argument(
        "--ttft-ms", type=_point, nargs="+", default=[], metavar="N=MS", help="time to first token with N requests"
    )
    worker.add_argument(
        "--cold-start", type=_start_duration, nargs="+", default=[], metavar="TIME", help="measured starts, like 41s"
    )
    worker.add_argument(
        "--stop", type=_duration, default=1.0, metavar="TIME", help="a worker's exit when it is stopped (default: 1s)"
    )
    requests = result.add_argument_group("the requests")
    source = requests.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="CSV with the columns time and, if known, tokens")
    source.add_argument("--trace-log", type=Path, metavar="FILE", help="a worker's log with times")
    source.add_argument("--day", type=_positive_count, metavar="N", help="a made-up day of N requests")
    requests.add_argument(
        "--peak", type=_peak, default=1.8, metavar="X", help="made-up day: peak rate / mean rate (default: 1.8)"
    )
    requests.add_argument(
        "--bursts", type=_count, default=4, metavar="N", help="made-up day: bursts of 1 %% of it (default: 4)"
    )
    requests.add_argument(
        "--duration",
        type=_positive_duration,
        default=DAY_S,
        metavar="TIME",
        help="made-up day: its length (default: 24h)",
    )
    requests.add_argument(
        "--tokens", type=_positive, default=300.0, metavar="N", help="mean output tokens, if not known (default: 300)"
    )
    requests.add_argument("--seed", type=_count, default=0, metavar="N", help="of all that is random (default: 0)")
    _add_grid(result.add_argument_group("the settings to try; every combination"))
    answer = result.add_argument_group("the answer")
    goals = answer.add_mutually_exclusive_group(required=True)
    for share in SHARES:
        goals.add_argument(
            f"--ttft-p{share}", type=_duration, metavar="TIME", help=f"most time to first token, p{share}, like 2s"
        )
    answer.add_argument(
        "--price", type=_positive, metavar="USD", help="of a worker for an hour; without it, GPU hours are compared"
    )
    answer.add_argument(
        "--active-price", type=_positive, metavar="USD", help="of a worker that workersMin keeps (default: --price)"
    )
    answer.add_argument("--all", action="store_true", help="print all settings, not only the frontier")
    answer.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    answer.add_argument("--plot", type=Path, metavar="FILE", help="write the frontier as .svg or .png")


def _add_grid(grid: Any) -> None:
    """Add the lists of settings."""
    default = Grid()
    grid.add_argument(
        "--queue-delay",
        type=_queue_delay,
        nargs="*",
        default=default.queue_delays_s,
        metavar="TIME",
        help="scalerValue of QUEUE_DELAY (default: 1s 4s)",
    )
    grid.add_argument(
        "--request-count",
        type=_positive_count,
        nargs="*",
        default=default.request_counts,
        metavar="N",
        help="scalerValue of REQUEST_COUNT (default: 1 4 16)",
    )
    grid.add_argument(
        "--concurrency",
        type=_concurrency,
        nargs="+",
        metavar="N",
        help="MAX_CONCURRENCY (default: the three largest measured ones)",
    )
    grid.add_argument(
        "--idle-timeout",
        type=_idle_timeout,
        nargs="+",
        default=default.idle_timeouts_s,
        metavar="TIME",
        help="idleTimeout with QUEUE_DELAY (default: 5s 60s 300s)",
    )
    grid.add_argument(
        "--workers-min",
        type=_count,
        nargs="+",
        default=default.workers_min,
        metavar="N",
        help="workersMin of the endpoint (default: 0 1 2)",
    )
    grid.add_argument(
        "--workers-max",
        type=_positive_count,
        nargs="+",
        default=default.workers_max,
        metavar="N",
        help="workersMax of the endpoint (default: 3 10)",
    )


def _point(text: str) -> tuple[int, float]:
    count, _, value = text.partition("=")
    try:
        return _positive_count(count), _rate(value)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write N=VALUE, like 8=480, from {_MIN_RATE:g} to {_MAX_RATE:,.0f}"
        ) from None


def _duration(text: str) -> float:
    found = _DURATION.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: write a time like 500ms, 2s, 5m or 24h")
    return float(found[1]) * _UNITS_S[found[2]]


def _start_duration(text: str) -> float:
    seconds = _duration(text)
    if seconds > DAY_S:
        raise argparse.ArgumentTypeError(f"{text!r}: a start takes less than 24h")
    return seconds


def _positive_duration(text: str) -> float:
    seconds = _duration(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r}: write more than 0")
    return seconds


def _queue_delay(text: str) -> float:
    seconds = _duration(text)
    if seconds < 0.5:  # noqa: PLR2004 (the platform's minimum)
        raise argparse.ArgumentTypeError(f"{text!r}: RunPod accepts 0.5s and more")
    return seconds


def _idle_timeout(text: str) -> float:
    seconds = _duration(text)
    if not 1 <= seconds <= 3600 or seconds != int(seconds):  # noqa: PLR2004 (the platform's limits)
        raise argparse.ArgumentTypeError(f"{text!r}: RunPod accepts whole seconds from 1s to 3600s")
    return seconds


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _rate(text: str) -> float:
    value = _positive(text)
    if not _MIN_RATE <= value <= _MAX_RATE:
        raise argparse.ArgumentTypeError(f"{text!r} is not from {_MIN_RATE:g} to {_MAX_RATE:g}")
    return value


def _concurrency(text: str) -> int:
    count = _positive_count(text)
    if count > _MAX_CONCURRENCY:
        raise argparse.ArgumentTypeError(f"{text!r}: no worker runs more than {_MAX_CONCURRENCY} requests at once")
    return count


def _peak(text: str) -> float:
    value = _positive(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: the peak's rate is at least the mean rate, 1")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return int(text)


def _positive_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Search; print and write the results; return the exit code: 0 if settings meet the goal, otherwise 1."""
    try:
        _check(arguments)
        worker = _worker(arguments)
        trace = _trace(arguments)
        plans = _plans(arguments, worker)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    share = next(share for share in SHARES if getattr(arguments, f"ttft_p{share}") is not None)
    goal = Goal(share, getattr(arguments, f"ttft_p{share}"))
    results = _search(arguments, worker, trace, plans)
    best = cheapest(results, goal)
    sys.stdout.write(render(results, goal, best, worker, trace, everything=arguments.all))
    if arguments.json is not None:
        report.write_json(arguments.json, to_document(results, goal, best, worker, trace))
    if arguments.plot is not None:
        plots.write_frontier(results, goal, arguments.plot)
    return 0 if best else 1


def _check(arguments: argparse.Namespace) -> None:
    """Check what argparse cannot.

    Raises:
        InputError: an option cannot be used.
    """
    if arguments.plot is not None and arguments.plot.suffix not in (".svg", ".png"):
        raise InputError(f"--plot {arguments.plot}: the name must end with .svg or .png")
    if arguments.active_price is not None and arguments.price is None:
        raise InputError("--active-price is for the workers of workersMin: give --price, that of the others, too")
    for path in filter(None, (arguments.json, arguments.plot)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise InputError(f"{path} cannot be written")


def _worker(arguments: argparse.Namespace) -> WorkerProfile:
    figures = Figures()
    for path in arguments.report:
        figures.read_report(path)
    if arguments.worker_log is not None:
        figures.read_log(WorkerLog(arguments.worker_log))
    figures.tokens_per_s |= dict(arguments.throughput)
    figures.ttft_s |= {count: milliseconds / 1000 for count, milliseconds in arguments.ttft_ms}
    figures.cold_starts_s = arguments.cold_start or figures.cold_starts_s
    return figures.profile(arguments.stop)


def _trace(arguments: argparse.Namespace) -> Trace:
    tokens = TokenCounts(arguments.tokens, arguments.seed)
    if arguments.trace is not None:
        return read_csv(arguments.trace, tokens)
    if arguments.trace_log is not None:
        return read_worker_log(WorkerLog(arguments.trace_log), tokens)
    day = MadeUpDay(arguments.day, arguments.peak, arguments.bursts, arguments.duration, arguments.seed)
    return day.trace(tokens)


def _plans(arguments: argparse.Namespace, worker: WorkerProfile) -> list[EndpointPlan]:
    grid = Grid(
        arguments.queue_delay,
        arguments.request_count,
        arguments.concurrency or sorted(worker.tokens_per_s)[-3:],
        arguments.idle_timeout,
        arguments.workers_min,
        arguments.workers_max,
    )
    plans = list(grid.plans())
    if not plans:
        raise InputError(
            "no settings to try: give --queue-delay or --request-count a value, and --workers-max one that is not "
            "below --workers-min"
        )
    return plans


def _search(
    arguments: argparse.Namespace, worker: WorkerProfile, trace: Trace, plans: Sequence[EndpointPlan]
) -> list[Result]:
    prices = arguments.price and Prices(arguments.price, arguments.active_price or arguments.price)
    shown_at = time.monotonic()

    def show(_: Result) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at >= _PROGRESS_S:
            shown_at = time.monotonic()
            print_progress(f"{len(search.results)} of {len(plans)} settings tried")

    search = Search(worker, trace, prices, arguments.seed, show)
    return search.run(plans)


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
