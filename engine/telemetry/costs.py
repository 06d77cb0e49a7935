"""What a job cost and where its time went, and the sums over jobs by model."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.run_clock import CLOCK
from engine.telemetry.job_times import OTHER, JobTimes
from engine.telemetry.worker_seconds import WorkerSeconds

# Clients name models: no more names than these are told apart.
MAX_MODELS = 64

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Sums:
    """Sums over jobs: their number, their seconds, and their tokens."""

    jobs: int = 0
    worker_s: float = 0.0
    start_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0


class Costs:
    """The costs of one worker's jobs.

    Args:
        started_at: when the worker was started, by `now`.
        price_per_second: of the worker, in the user's currency; None if it is not known.
        now: a clock, in seconds.
    """

    def __init__(
        self, started_at: float, price_per_second: float | None = None, now: Callable[[], float] = CLOCK.now
    ) -> None:
        self.seconds = WorkerSeconds(started_at, now)
        self.price_per_second = price_per_second
        self.by_model: dict[str, Sums] = defaultdict(Sums)

    def begin(self, times: JobTimes) -> None:
        """Begin to count for a job."""
        self.seconds.begin(times.share)
        times.describe = partial(self.document, times)

    def end(self, times: JobTimes) -> None:
        """Set a job's share for good, and add it to the sums."""
        self.seconds.end(times.share)
        times.served_model = self._served_model(times)
        sums = self.by_model[times.served_model]
        sums.jobs += 1
        sums.worker_s += times.share.worker_s
        sums.start_s += times.share.start_s
        sums.prompt_tokens += times.prompt_tokens
        sums.output_tokens += times.output_tokens

    def document(self, times: JobTimes) -> dict[str, Any]:
        """Return where a job's time went and what it cost, so far or in total; docs/api.md has the fields."""
        if times.ended_at is None:
            self.seconds.update(times.share)
        requests, share = times.requests, times.share
        document: dict[str, Any] = {
            "queue_s": _rounded(times.queue_s),
            "engine_queue_s": _rounded(sum(request.queued_s for request in requests)) if requests else None,
            "prefill_s": _rounded(sum(request.prefill_s for request in requests)) if requests else None,
            "decode_s": _rounded(sum(request.decode_s for request in requests)) if requests else None,
            "delivery_s": _rounded(times.delivery_s),
            "duration_s": _rounded(times.duration_s),
            "worker_s": _rounded(share.worker_s),
            "start_s": _rounded(share.start_s),
        }
        if self.price_per_second is not None:
            document["cost"] = self._cost(share.worker_s + share.start_s)
        return document

    def summary(self) -> dict[str, Any]:
        """Return what the worker's seconds were for: `start_s`, `idle_s` and the jobs' add up to `worker_s`."""
        totals = self.seconds.totals()
        document: dict[str, Any] = {
            "worker_s": _rounded(totals.worker_s),
            "start_s": _rounded(totals.start_s),
            "idle_s": _rounded(totals.idle_s),
            "jobs_s": _rounded(totals.jobs_s),
        }
        if self.price_per_second is not None:
            document["cost"] = self._cost(totals.worker_s)
        document["models"] = {
            name: {
                "jobs": sums.jobs,
                "worker_s": _rounded(sums.worker_s),
                "start_s": _rounded(sums.start_s),
                "tokens_in": sums.prompt_tokens,
                "tokens_out": sums.output_tokens,
                **({} if self.price_per_second is None else {"cost": self._cost(sums.worker_s + sums.start_s)}),
            }
            for name, sums in self.by_model.items()
        }
        return document

    def log_summary(self) -> None:
        """Log one line with `summary` as JSON."""
        _log.info("Worker seconds %s", json.dumps(self.summary()))

    def _served_model(self, times: JobTimes) -> str:
        name = times.model if times.requests and times.model else OTHER
        return name if name in self.by_model or len(self.by_model) < MAX_MODELS else OTHER

    def _cost(self, seconds: float) -> float:
        return float(f"{seconds * (self.price_per_second or 0.0):.6g}")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
