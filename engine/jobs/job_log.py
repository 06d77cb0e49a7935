"""The log lines of a job, or of an HTTP request: one JSON object when it starts, one when it ends."""

from __future__ import annotations

import json
import logging
from typing import Any

from engine.telemetry.job_times import JobTimes

# In characters; every route of vLLM is much shorter.
_MAX_ROUTE_LENGTH = 100

_log = logging.getLogger(__name__)


def log_started(job_id: str, job: dict[str, Any], *, with_input: bool) -> None:
    """Log that a job has started, with its input if the user wants to see it."""
    line = {"job": job_id, **_batch(job), "route": _route(job), "status": "started"}
    try:
        text = json.dumps(line | {"input": job.get("input")} if with_input else line)
    except RecursionError:  # An input that is nested too deeply can be read but not written.
        text = json.dumps(line | {"input": "nested too deeply"})
    _log.info("%s", text, extra={"job_id": job_id})


def log_ended(job: dict[str, Any], times: JobTimes, costs: dict[str, Any], outputs: int) -> None:
    """Log how a job ended.

    Args:
        job: as it was taken.
        times: of the job.
        costs: where its time went, as `Costs.document` has it.
        outputs: how many were delivered.
    """
    has_counts, first_output_s = bool(times.requests), times.first_output_s
    line = {
        "job": times.job_id,
        **_batch(job),
        "route": _route(job),
        "status": times.outcome,
        "tokens_in": times.prompt_tokens if has_counts else None,
        "tokens_out": times.output_tokens if has_counts else None,
        "first_output_s": None if first_output_s is None else round(first_output_s, 4),
        "batches": outputs,
        **costs,
    }
    _log.info("%s", json.dumps(line), extra={"job_id": times.job_id})


def _batch(job: dict[str, Any]) -> dict[str, str]:
    """Return the `batchId` that the platform gives to the jobs of a batch."""
    batch = job.get("batchId")
    return {"batchId": batch} if isinstance(batch, str) and batch else {}


def _route(job: dict[str, Any]) -> str | None:
    """Return the route that a job calls; None for anything else, as a client's own words belong in no log."""
    value = job.get("input")
    route = value.get("openai_route", value.get("route", "native")) if isinstance(value, dict) else None
    path = route.partition("?")[0] if isinstance(route, str) else None
    return path if path is not None and len(path) <= _MAX_ROUTE_LENGTH else None
