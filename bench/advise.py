"""`python -m bench advise`: which settings of an endpoint are the cheapest that keep its users' waiting time.

A worker's measured figures and a day of requests are simulated with each combination of settings, by the scaling rules
of the emulator. Nothing is started or measured: it takes a second for ten thousand requests and ten settings.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from bench.advisor import plots
from bench.advisor.errors import InputError
from bench.advisor.report import render, to_document
from bench.advisor.search import SHARES, Goal, Grid, Prices, Result, Search, cheapest
from bench.advisor.simulation import EndpointPlan
from bench.advisor.trace import MadeUpDay, TokenCounts, Trace, read_csv, read_worker_log
from bench.advisor.worker_log import WorkerLog
from bench.advisor.worker_profile import Figures, WorkerProfile
from bench.report import print_progress, write_json

_PROGRESS_S = 5.0


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
        write_json(arguments.json, to_document(results, goal, best, worker, trace))
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
