"""The commands for an endpoint that exists: update, rollback, status, logs, down."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import aclosing

from deploy import choice, environment, gpus, plan, report, rollback, rollout
from deploy.console import table
from deploy.context import Context
from deploy.errors import OptionError, RefusedError
from deploy.first_request import Site
from deploy.model import check_settings
from deploy.options import Options
from deploy.threads import in_thread


async def update(context: Context, name: str, options: Options, *, skip_doctor: bool = False) -> None:
    """Change what the options name of an endpoint, and wait until no worker runs an older release."""
    endpoint = await context.get(name)
    chosen = None
    if options.gpus:
        count = options.gpus_per_worker or (endpoint.gpu.count if endpoint.gpu and endpoint.gpu.count else 1)
        catalogue = await context.api.gpus(plan.min_cuda(options), count)
        chosen = gpus.named(catalogue, options.gpus, choice.unknown, count)
        choice.explain(context.console, chosen, None, catalogue)
    wanted = plan.update_request(endpoint, options, chosen)
    context.console.redaction.add(environment.secrets_in(wanted["env"]))
    if options.env and not skip_doctor:
        context.console.log("checking the settings")
        env = wanted["env"]
        await in_thread(lambda: check_settings(env.get("MODEL_NAME"), env))
        # The check takes a while, in which somebody else may have changed the endpoint: that change stays.
        endpoint = await context.api.endpoint(endpoint.id)
        wanted = plan.update_request(endpoint, options, chosen)
    await rollout.change(context, endpoint, wanted)


async def roll_back(context: Context, name: str, version: int | None) -> None:
    """Give an endpoint the values of an earlier release, and wait until no worker runs a later one."""
    endpoint = await context.get(name)
    body, target = rollback.rollback_request(endpoint, await context.api.releases(endpoint.id), version)
    context.console.redaction.add(environment.secrets_in(body.get("env", {})))
    context.console.log(f"back to release {'before the newest' if target is None else target}")
    await rollout.change(context, endpoint, body)


async def status(context: Context, name: str | None, *, as_json: bool = False) -> None:
    """Print an endpoint's workers, release, and price; without a name, all endpoints."""
    context.require_key()
    if name is None:
        endpoints = await context.api.endpoints()
        listed = [{"name": one.name, "id": one.id, "type": one.type, "image": one.image} for one in endpoints]
        text = "\n".join("  ".join(str(value or "") for value in row.values()) for row in listed)
        context.console.result(json.dumps(listed, indent=2) if as_json else text or "there are no endpoints")
        return
    endpoint = await context.get(name)
    workers, releases, catalogue = await asyncio.gather(
        context.api.workers(endpoint.id), context.api.releases(endpoint.id), context.api.gpus(plan.MIN_CUDA)
    )
    if as_json:
        shown = endpoint.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"request_urls"})
        shown["env"] = environment.masked(shown.get("env") or {})
        document = {
            "endpoint": {**shown, "openaiUrl": Site(context.client, endpoint).openai_url},
            "workers": workers.model_dump(mode="json", by_alias=True)["workers"],
            "rollout": releases.rollout.model_dump(mode="json", by_alias=True),
        }
        context.console.result(json.dumps(document, indent=2, ensure_ascii=False))
        return
    counts = workers.summary.model_dump()
    rows = {
        "Endpoint": f"{endpoint.name} ({endpoint.id}), {report.type_name(endpoint)}, image {endpoint.image}",
        "URL": Site(context.client, endpoint).openai_url,
        "Workers": ", ".join(f"{count} {state}" for state, count in counts.items() if count and state != "total")
        or "none",
        "Release": report.releases(releases),
        "Price": report.price(endpoint, catalogue, None),
    }
    lines = [
        f"  {one.id}  {one.status}  release {one.version}{' (old)' if one.is_stale else ''}  "
        f"{one.gpu_type_id or 'no GPU yet'}  {report.duration(one.uptime_seconds)}"
        for one in workers.workers
    ]
    context.console.result("\n".join([table(rows), *lines]))


async def logs(context: Context, name: str, *, follow: bool, tail: int, worker_id: str | None = None) -> None:
    """Print the logs of an endpoint's workers; with `follow`, until interrupted."""
    endpoint = await context.get(name)
    followed: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            workers = (await context.api.workers(endpoint.id)).workers
            chosen = [one.id for one in workers if worker_id in (None, one.id)]
            if worker_id is not None and not chosen:
                ids = ", ".join(one.id for one in workers) or "none"
                raise RefusedError(f"{endpoint.name} has no worker {worker_id}; it has {ids}")
            if not workers and not followed:
                context.console.log(f"{endpoint.name} has no workers now" + ("; waiting for one" if follow else ""))
            for one in chosen:
                if one not in followed:
                    followed[one] = asyncio.create_task(_print_log(context, endpoint.id, one, follow=follow, tail=tail))
            for task in followed.values():
                if task.done():
                    task.result()  # raises what has ended it
            if not follow:
                await asyncio.gather(*followed.values())
                return
            await asyncio.sleep(context.poll_s)
    finally:
        for task in followed.values():
            task.cancel()
        await asyncio.gather(*followed.values(), return_exceptions=True)


async def _print_log(context: Context, endpoint_id: str, worker: str, *, follow: bool, tail: int) -> None:
    async with aclosing(context.api.logs(endpoint_id, worker, tail=tail, pause_s=context.poll_s)) as lines:
        while True:
            try:
                # A log that is not followed ends where nothing more comes: the API keeps the stream open.
                line = await asyncio.wait_for(anext(lines), None if follow else 1.0 + context.poll_s)
            except (StopAsyncIteration, TimeoutError):
                return
            context.console.result(f"{line.time} {worker} {line.source}: {line.text}")


async def down(context: Context, name: str, *, confirmed: bool) -> None:
    """Delete an endpoint with its workers and jobs."""
    endpoint = await context.get(name)
    path = f"/v2/serverless/{endpoint.id}"
    if context.dry_run:
        context.show_request("DELETE", path)
        return
    workers = (await context.api.workers(endpoint.id)).summary.total
    question = (
        f"Delete {endpoint.name} ({endpoint.id}), its {workers} workers and all its jobs? This cannot be undone. [y/N] "
    )
    if not confirmed and not _is_confirmed(question):
        raise OptionError("not deleted: answer y, or give --yes")
    try:
        await context.api.delete(endpoint.id)
    except asyncio.CancelledError:
        context.console.log(f"{endpoint.name} may have been deleted: look at `status`")
        raise
    context.console.result(f"{endpoint.name} ({endpoint.id}) is deleted")


def _is_confirmed(question: str) -> bool:
    # asyncio's handler of Ctrl-C would cancel a task, which nobody notices before the answer.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False
    finally:
        signal.signal(signal.SIGINT, handler)
