"""What the commands print of an endpoint: how to call it, how it started, what it costs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC
from typing import Any

from deploy.api import KEY_VARIABLE
from deploy.console import table
from deploy.first_request import Answer, Site
from deploy.gpus import excluded_types
from deploy.options import LOAD_BALANCER
from deploy.rollback import field_name
from runpod_api.models import Endpoint, GpuType, ListEndpointReleasesResponse

_RELEASES = 10


def ready(  # noqa: PLR0913, PLR0917 (all that there is to say)
    endpoint: Endpoint,
    site: Site,
    answer: Answer,
    durations_s: Mapping[str, float],
    cold_start: Mapping[str, Any] | None,
    price: str,
) -> Iterator[str]:
    """Yield what to know of an endpoint that has answered, and a command that asks it again.

    Args:
        endpoint: as the API describes it.
        site: as its clients see it.
        answer: to the first request.
        durations_s: of the phases until then, as seen here.
        cold_start: of the worker, as it measured.
        price: of its workers.
    """
    said = " ".join(answer.text.split())[:80] if answer.kind.streams else f"{len(answer.text)} bytes"
    rows = {
        "Endpoint": f"{endpoint.name} ({endpoint.id}), {type_name(endpoint)}",
        "URL": site.openai_url,
        "Answer": f"{answer.kind.name}, first token after {answer.first_token_s or 0:.1f} s: {said}",
        "Start": ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in durations_s.items()),
        "Worker": receipt(cold_start),
        "Price": price,
    }
    yield table({label: text for label, text in rows.items() if text})
    env = endpoint.env or {}
    model = env.get("SERVED_MODEL_NAME", env.get("MODEL_NAME", "")).partition(",")[0]
    body = {"model": model, **{name: value for name, value in answer.kind.body.items() if name != "stream"}}
    yield (
        f"\ncurl -s {shlex.quote(site.openai_url + answer.kind.route.removeprefix('/v1'))} \\\n"
        f'  -H "Authorization: Bearer ${KEY_VARIABLE}" -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def receipt(cold_start: Mapping[str, Any] | None) -> str:
    """Return the phases of a worker's start, by its own clock."""
    if cold_start is None:
        return ""
    # It waits for its first job in a phase of its own, which is no part of a cold start.
    phases = {name: value for name, value in cold_start["phases_s"].items() if value >= 0.05}  # noqa: PLR2004 (shown: 0.1)
    return f"cold start {cold_start['total_s']:.1f} s: " + ", ".join(
        f"{name} {value:.1f}" for name, value in phases.items()
    )


def price(endpoint: Endpoint, catalogue: Sequence[GpuType], gpu_type: str | None) -> str:
    """Return what workers cost per hour: one that runs, those that always run, and all at the most.

    Args:
        endpoint: as the API describes it.
        catalogue: GPU types.
        gpu_type: of the worker that runs, if that is known; others may get any type of the endpoint's pools.
    """
    if endpoint.gpu is None:
        return ""
    count = endpoint.gpu.count or 1
    excluded = excluded_types(endpoint)
    pools = [one for one in catalogue if one.pool in endpoint.gpu.pools and one.id not in excluded]
    prices = {one.id: one.price.serverless * count for one in pools if one.price.serverless is not None}
    if not prices:
        return "not known"
    least, most = min(prices.values()), max(prices.values())
    each = f"${least:.2f}" if least == most else f"${least:.2f} to ${most:.2f}"
    if gpu_type in prices:
        least = prices[gpu_type]
        each = f"${least:.2f}"
    low, high = endpoint.workers.min or 0, endpoint.workers.max or 0
    idle = f"${least * low:.2f}/h idle ({low} always run)"
    return f"{each}/h while a worker runs; {idle}; at most ${most * high:.2f}/h ({high} workers)"


def releases(answer: ListEndpointReleasesResponse) -> str:
    """Return the current release and how far it is, and a line for each of the last ones: when, and what it changed."""
    rollout = answer.rollout
    in_progress = ", in progress" if rollout.in_progress else ""
    now = f"{answer.endpoint_version}, on {rollout.workers_on_latest} of {rollout.workers_total} workers{in_progress}"
    newest = sorted(answer.releases, key=lambda one: (one.version or 0, one.created_at), reverse=True)[:_RELEASES]
    lines = [
        f"  {one.version}  {one.created_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC  "
        + (", ".join(field_name(entry.field) for entry in one.diff) or "created")
        for one in newest
    ]
    return "\n".join([now, *lines])


def type_name(endpoint: Endpoint) -> str:
    """Return what kind of endpoint it is."""
    return "load balancer" if endpoint.type == LOAD_BALANCER else "queue"


def duration(seconds: int | None) -> str:
    """Return how long a worker runs; empty if it does not yet."""
    return "" if seconds is None else f"up {seconds} s"
