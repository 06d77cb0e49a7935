"""Changes of an endpoint: what differs is sent, and the new release is followed until no worker runs an older one."""

from __future__ import annotations

import asyncio
from typing import Any

from deploy import plan
from deploy.api import check
from deploy.context import Context
from deploy.errors import CapacityError
from deploy.start import PHASES, StartWatcher
from runpod_api.models import Endpoint

# They act on the autoscaler at once: no worker is replaced for them.
_NO_RELEASE = {"name", "scaling", "timeout", "workers"}


async def change(context: Context, endpoint: Endpoint, wanted: dict[str, Any], *, wait: bool = True) -> Endpoint | None:
    """Change what differs, say what, and follow the release if it makes one; None if nothing does, or in a dry run."""
    body, lines = plan.changes(endpoint, wanted)
    if not body:
        context.console.log(f"{endpoint.name} ({endpoint.id}) is as wanted: no change")
        return None
    check("UpdateEndpointRequest", body)
    for line in lines:
        context.console.log(f"{endpoint.name}: {line}")
    if body.get("networkVolumes") == [] and "disk" not in body and endpoint.disk is not None:
        context.console.log(
            f"without a volume, a model that the image lacks goes to the container's disk of {endpoint.disk} GB: "
            "give --disk if it needs more"
        )
    if context.dry_run:
        context.show_request("PATCH", f"/v2/serverless/{endpoint.id}", body)
        return None
    try:
        changed = await context.api.update(endpoint.id, body)
    except asyncio.CancelledError:
        context.console.log(f"{endpoint.name} may have been changed: look at `status {endpoint.name}`")
        raise
    context.console.log(f"{endpoint.name} is updated")
    if body.keys() <= _NO_RELEASE:
        context.console.log("this takes effect at once: no worker is replaced for it")
    elif wait:
        await _follow(context, changed)
    return changed


async def _follow(context: Context, endpoint: Endpoint) -> None:
    """Wait until all workers run the newest release; a new worker that cannot start ends the wait."""
    api, console = context.api, context.console
    version = (await api.releases(endpoint.id)).endpoint_version
    progress = console.progress(PHASES)
    watcher = StartWatcher(api, endpoint.id, console, progress, version=version, poll_s=context.poll_s)
    rollout = asyncio.create_task(_until_rolled_out(context, endpoint, version))
    try:
        await first_of(rollout, asyncio.create_task(watcher.watch()), context.timeout_s)
    except TimeoutError:
        raise CapacityError(
            f"the release is not on all workers after {context.timeout_s:.0f} s: look at `logs {endpoint.name}`, "
            f"or go back with `rollback {endpoint.name}`"
        ) from None
    except asyncio.CancelledError:
        name = endpoint.name
        console.log(f"{name}: release {version} goes on: `status {name}` shows it, `rollback {name}` undoes it")
        raise
    finally:
        progress.close()
    console.result(f"{endpoint.name}: release {version} is rolled out, {progress.total_s:.1f} s after the change")


async def _until_rolled_out(context: Context, endpoint: Endpoint, version: int | None) -> None:
    """Wait until no worker runs an older release, and as many as always run are ready; say how far that is."""
    said = ""
    while True:
        answer = await context.api.releases(endpoint.id)
        rollout = answer.rollout
        is_current = version is None or answer.endpoint_version is None or answer.endpoint_version >= version
        text = f"{rollout.workers_on_latest} of {rollout.workers_total} workers run release {answer.endpoint_version}"
        if not rollout.workers_total:
            text = f"no workers run now; the next one runs release {answer.endpoint_version}"
        if text != said:
            context.console.log(text)
            said = text
        if is_current and not rollout.in_progress:
            summary = (await context.api.workers(endpoint.id)).summary
            needed = max(endpoint.workers.min or 0, min(rollout.workers_total, 1))
            if summary.running + summary.idle >= needed:
                return
        await asyncio.sleep(context.api.pause_s(context.poll_s))


async def first_of(wanted: asyncio.Task[Any], watch: asyncio.Task[None], timeout_s: float) -> None:
    """Wait until `wanted` is done; raise what ends either task, or TimeoutError."""
    try:
        done, _ = await asyncio.wait({wanted, watch}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError
        for task in (wanted, watch):
            if task in done:
                task.result()
                return
    finally:
        for task in (wanted, watch):
            task.cancel()
        await asyncio.gather(wanted, watch, return_exceptions=True)
