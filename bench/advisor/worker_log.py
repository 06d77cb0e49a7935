"""Read a worker's log: one line of JSON when a job starts, one when it ends (`engine/queue/job_log.py`).

    2026-11-30T10:00:00Z INFO   | {"job": "a-u1", "route": "/v1/chat/completions", "status": "started"}
    2026-11-30T10:00:04Z INFO   | {"job": "a-u1", ..., "tokens_out": 200, "first_output_s": 0.04, "duration_s": 4.1}

With LOG_FORMAT=json, each line is an object, and has a time:

    {"time": "2026-11-30T10:00:00.000+00:00", "level": "INFO", "job": "a-u1", ..., "status": "started"}

How many jobs ran at once is known from the order of the lines, and from their times if they have any: log drivers add
them (`docker logs --timestamps`). With times it is also a trace: of takes, as the queue before the worker is not seen.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.advisor.errors import InputError

_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d{1,6})?\d*(?:Z|[+-]\d\d:?\d\d)?")
_COLD_START = "Cold start {"
_JOB_LINE = re.compile(r'\{"job": ')
_OBJECT_LINE = re.compile(r'\{"time": ?"')


@dataclass
class LoggedJob:
    """A job of the log.

    Args:
        line: number of its first line.
        started_s: when it was taken, in seconds since 1970; None if the line has no time.
        at_start: how many jobs ran, with it.
        watched: time between the lines during its run, in seconds, or their number if they have no times.
        job_time: the same, times the jobs that ran.
        tokens: output tokens, if it was completed and they are known.
        first_output_s: from the take to its first output; None if that was the whole answer, as without streaming.
        duration_s: from the take to its end.
    """

    line: int
    started_s: float | None
    at_start: int
    watched: float = 0.0
    job_time: float = 0.0
    tokens: int | None = None
    first_output_s: float | None = None
    duration_s: float | None = None

    @property
    def concurrency(self) -> int:
        """How many jobs ran at once during its run, on average."""
        return max(round(self.job_time / self.watched), 1) if self.watched else self.at_start


class WorkerLog:
    """The jobs and starts of one worker's log.

    Args:
        path: the file.

    Raises:
        InputError: it cannot be read, or a line of a job is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.jobs: list[LoggedJob] = []
        self.cold_starts_s: list[float] = []
        self._running: dict[str, LoggedJob] = {}
        self._last_line_s: float | None = None
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            self._read(number, line)

    def _read(self, number: int, line: str) -> None:
        if found := _OBJECT_LINE.search(line):
            self._read_object(number, line[: found.start()], line[found.start() :])
        elif (start := line.find(_COLD_START)) >= 0:
            self._start(self._json(number, line[start + len(_COLD_START) - 1 :]))
        elif found := _JOB_LINE.search(line):
            self._job(number, _time_s(line[: found.start()]), self._json(number, line[found.start() :]))

    def _read_object(self, number: int, before: str, text: str) -> None:
        """Read a line of LOG_FORMAT=json."""
        is_start = _COLD_START in text
        if not is_start and '"job":' not in text:
            return
        document = self._json(number, text)
        if "job" in document:
            time_s = _time_s(before)
            self._job(number, _time_s(document["time"]) if time_s is None else time_s, document)
        elif is_start:
            message: str = document.get("message", "")
            self._start(self._json(number, message[message.index(_COLD_START) + len(_COLD_START) - 1 :]))

    def _start(self, document: dict[str, Any]) -> None:
        """Note a start of the worker: no job of before it runs."""
        if (total_s := document.get("total_s")) is not None:
            self.cold_starts_s.append(total_s)
        self._running.clear()

    def _job(self, number: int, time_s: float | None, document: dict[str, Any]) -> None:
        """Note the start or the end of a job."""
        self._watch(time_s)
        if document.get("status") == "started":
            job = LoggedJob(number, time_s, len(self._running) + 1)
            self._running[document["job"]] = job
            self.jobs.append(job)
        elif (ended := self._running.pop(document["job"], None)) and document.get("status") == "completed":
            ended.tokens, ended.duration_s = document.get("tokens_out"), document.get("duration_s")
            if document.get("batches", 0) > 1:
                ended.first_output_s = document.get("first_output_s")

    def _watch(self, time_s: float | None) -> None:
        """Count the time since the last line, which ends now, for all jobs that run."""
        passed = 1.0 if time_s is None or self._last_line_s is None else time_s - self._last_line_s
        self._last_line_s = time_s
        for job in self._running.values():
            job.watched += passed
            job.job_time += passed * len(self._running)

    def _json(self, number: int, text: str) -> dict[str, Any]:
        """Return the JSON object at the start of the text, which a log driver may have wrapped."""
        try:
            document: dict[str, Any] = json.JSONDecoder().raw_decode(text)[0]
        except ValueError:
            raise InputError(
                f"{self.path}, line {number}: the JSON is cut off or damaged; export the log with whole lines"
            ) from None
        return document

    def by_concurrency(self) -> tuple[dict[int, float], dict[int, float]]:
        """Return tokens a second of all requests together, and the median TTFT in seconds, by concurrency."""
        rates: dict[int, list[float]] = defaultdict(list)
        ttfts_s: dict[int, list[float]] = defaultdict(list)
        for job in self.jobs:
            if job.tokens and job.duration_s:
                rates[job.concurrency].append(job.concurrency * job.tokens / job.duration_s)
                if job.first_output_s is not None:
                    ttfts_s[job.at_start].append(job.first_output_s)
        return (
            {count: median(values) for count, values in sorted(rates.items())},
            {count: median(values) for count, values in sorted(ttfts_s.items())},
        )

    def arrivals(self) -> list[tuple[float, int | None]]:
        """Return when each job was taken, in seconds since 1970, and its output tokens if they are known.

        Raises:
            InputError: a line has no time, or there is no job.
        """
        found = []
        for job in self.jobs:
            if job.started_s is None:
                raise InputError(
                    f"{self.path}, line {job.line}: no time; export the log with times (docker logs --timestamps)"
                )
            found.append((job.started_s, job.tokens))
        if not found:
            raise InputError(f"{self.path} has no line of a job that starts: is it a worker's log?")
        return found


def _time_s(text: str) -> float | None:
    found = _TIME.search(text)
    if found is None:
        return None
    try:
        # Log drivers write nanoseconds.
        time = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", found[0]))
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
