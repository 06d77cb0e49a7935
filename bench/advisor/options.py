"""The options of `python -m bench advise`, and what their values may be."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from bench.advisor.search import SHARES, Grid
from bench.advisor.trace import DAY_S

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}
# Of tokens a second, or of milliseconds to the first: what is beyond is a mistake, and would take for ever.
_MIN_RATE, _MAX_RATE = 0.001, 1e7
_MAX_CONCURRENCY = 10_000


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
