"""The log lines of a job, or of an HTTP request: one JSON object when it starts, one when it ends."""

from __future__ import annotations

import json
import logging
from typing import Any

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


def log_ended(  # noqa: PLR0913 (the fields of the line)
    job_id: str,
    job: dict[str, Any],
    status: str,
    *,
    tokens: tuple[int, int] | None,
    first_output_s: float | None,
    duration_s: float,
    outputs: int,
) -> None:
    """Log how a job ended.

    Args:
        job_id: its id.
        job: as it was taken.
        status: "completed", "failed", "stopped" or "undelivered".
        tokens: in and out, if the engine knows them.
        first_output_s: from the take to its first output, in seconds; None without output.
        duration_s: from the take to the end of its last delivery, in seconds.
        outputs: how many were delivered.
    """
    tokens_in, tokens_out = tokens or (None, None)
    line = {
        "job": job_id,
        **_batch(job),
        "route": _route(job),
        "status": status,
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "first_output_s": None if first_output_s is None else round(first_output_s, 4),
        "duration_s": round(duration_s, 4),
        "batches": outputs,
    }
    _log.info("%s", json.dumps(line), extra={"job_id": job_id})


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
