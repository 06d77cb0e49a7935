"""Arrivals of requests and their output tokens: from a CSV file, from a worker's log, or a made-up day."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from bench.advisor.errors import InputError
from bench.advisor.worker_log import WorkerLog

DAY_S = 86_400.0
_MAX_DAYS = 366
# In the year 5138; milliseconds since 1970 are above it.
_MAX_TIME_S = 1e11
_DAY_PIECES = 1440
_BURST_S = 60.0
# Of the logarithm of the output tokens: 5 % of answers are 2.7 times as long as the mean.
_SIGMA = 0.8


@dataclass(frozen=True)
class Trace:
    """When requests come, and how long their answers are.

    Args:
        arrivals_s: in seconds from the beginning, in order.
        tokens: output tokens of each.
        duration_s: how long workers are watched, and paid for; at least until the last answer has ended.
    """

    arrivals_s: Sequence[float]
    tokens: Sequence[int]
    duration_s: float


@dataclass(frozen=True)
class TokenCounts:
    """Output tokens of requests of which they are not known: a lognormal distribution with this mean."""

    mean: float
    seed: int = 0

    def sample(self, count: int) -> list[int]:
        """Return that many numbers of tokens, each at least 1; the same for the same seed."""
        generator = np.random.default_rng([self.seed, 1])
        values = generator.lognormal(math.log(self.mean) - _SIGMA**2 / 2, _SIGMA, count)
        found: list[int] = np.maximum(values.round(), 1).astype(int).tolist()
        return found


@dataclass(frozen=True)
class MadeUpDay:
    """A day: a cosine with its peak at two thirds, and bursts of a minute with a hundredth of the day's requests each.

    Args:
        requests: in the whole day.
        peak: rate at the peak divided by the mean rate, from 1 (a constant rate) on; above 2 the night is silent.
        bursts: how many, at random times.
        duration_s: how long the day is.
        seed: other seeds give other days.
    """

    requests: int
    peak: float = 1.8
    bursts: int = 4
    duration_s: float = DAY_S
    seed: int = 0

    def trace(self, tokens: TokenCounts) -> Trace:
        """Return the day with answers of these lengths."""
        generator = np.random.default_rng([self.seed, 0])
        edges_s = np.linspace(0.0, self.duration_s, _DAY_PIECES + 1)
        phase = np.cos(2 * np.pi * (edges_s[:-1] / self.duration_s - 2 / 3))
        rate = np.maximum(1 + (self.peak - 1) * phase, 0.0)
        in_bursts = min(self.bursts * max(self.requests // 100, 1), self.requests)
        chosen = generator.choice(_DAY_PIECES, self.requests - in_bursts, p=rate / rate.sum())
        arrivals_s = edges_s[chosen] + generator.random(len(chosen)) * (self.duration_s / _DAY_PIECES)
        if in_bursts:
            starts_s = generator.random(self.bursts) * max(self.duration_s - _BURST_S, 0.0)
            burst_s = starts_s[np.arange(in_bursts) % self.bursts] + generator.random(in_bursts) * _BURST_S
            arrivals_s = np.concatenate([arrivals_s, burst_s])
        arrivals_s.sort()
        return Trace(arrivals_s.tolist(), tokens.sample(self.requests), self.duration_s)


def read_csv(path: Path, tokens: TokenCounts) -> Trace:
    """Read a file with a heading and the columns `time` (seconds, or ISO 8601) and, if known, `tokens`.

    Raises:
        InputError: it cannot be read; the message names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if "time" not in (rows.fieldnames or ()):
                raise InputError(f"{path}, line 1: no column `time`; the first line must be `time` or `time,tokens`")
            known = [(_time_s(path, rows.line_num, row), _tokens(path, rows.line_num, row)) for row in rows]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV file in UTF-8: {error}") from None
    if not known:
        raise InputError(f"{path} has no requests: add a line for each below the heading")
    times_s = [time_s for time_s, _ in known]
    if max(times_s) > _MAX_TIME_S:
        raise InputError(f"{path}: {max(times_s):.0f} is a time in milliseconds or less: write all times in seconds")
    if (days := (max(times_s) - min(times_s)) / DAY_S) > _MAX_DAYS:
        raise InputError(f"{path} lasts {days:,.0f} days: write all times in seconds, or all in ISO 8601")
    return _trace(known, tokens)


def read_worker_log(log: WorkerLog, tokens: TokenCounts) -> Trace:
    """Return the takes of a worker's log as arrivals.

    Raises:
        InputError: it has none, or no times.
    """
    return _trace(log.arrivals(), tokens)


def _trace(known: list[tuple[float, int | None]], tokens: TokenCounts) -> Trace:
    known.sort(key=lambda request: request[0])
    first_s = known[0][0]
    lengths = [
        sampled if given is None else given
        for (_, given), sampled in zip(known, tokens.sample(len(known)), strict=True)
    ]
    return Trace([time_s - first_s for time_s, _ in known], lengths, known[-1][0] - first_s)


def _time_s(path: Path, line: int, row: dict[str, str]) -> float:
    text = (row["time"] or "").strip()
    try:
        time_s = float(text)
    except ValueError:
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            time_s = math.nan
        else:
            time_s = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(time_s):
        raise InputError(f"{path}, line {line}: time={text!r}: write seconds (12.5) or ISO 8601 (2026-11-30T10:00:00Z)")
    return time_s


def _tokens(path: Path, line: int, row: dict[str, str]) -> int | None:
    text = (row.get("tokens") or "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{path}, line {line}: tokens={text!r}: write an integer of at least 1, or nothing")
    return int(text)
