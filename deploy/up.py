"""The command `up`: from a model's name to an endpoint that has answered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from deploy import choice, environment, plan, report, rollout
from deploy.api import KEY_VARIABLE, check, same_name
from deploy.console import Console, table
from deploy.context import Context
from deploy.errors import CapacityError, DeployError, OptionError
from deploy.first_request import KINDS, Site
from deploy.gpus import Choice
from deploy.model import Examined, examine
from deploy.options import Options
from deploy.start import PHASES, REQUEST, StartWatcher
from deploy.threads import in_thread
from runpod_api.models import Endpoint, GpuType


async def up(  # noqa: PLR0913 (the command's own options)
    context: Context,
    model: str,
    options: Options,
    *,
    name: str | None = None,
    revision: str | None = None,
    skip_doctor: bool = False,
    wait: bool = True,
    kinds: Sequence[str] = (),
) -> None:
    """Make an endpoint for a model be as the options say: create it, change what differs, or leave it; then ask it.

    Raises:
        DeployError: one line that says what to change.
        BuilderError: the doctor cannot read the model.
    """
    _check_is_given(model, options)
    own_name = name or plan.endpoint_name(model)
    existing = None if context.dry_run and not context.has_key else await context.find(own_name)
    if name is None and existing is not None:
        _check_is_for(existing, model)
    examined = None if skip_doctor else await in_thread(lambda: _examine(context.console, model, revision, options))
    if existing is not None:  # The doctor takes a while, in which somebody else may have changed the endpoint.
        existing = await context.api.endpoint(existing.id)
        options = plan.with_places(options, existing)
    chosen, catalogue = await _choose(context, options, examined, existing)
    download_bytes = None if examined is None else examined.download_bytes
    body = plan.create_request(own_name, model, options, chosen, download_bytes)
    if revision is not None:
        body["env"]["MODEL_REVISION"] = revision
    if examined is None and existing is not None:
        plan.keep_size(body, existing, options)
    context.console.redaction.add(environment.secrets_in(body["env"]))
    if chosen is None:
        _show_without_pools(context, body, examined)
        return
    choice.explain(context.console, chosen, examined, catalogue)
    endpoint = await _make(context, existing, body, wait=wait)
    if endpoint is None:
        return
    if wait and _can_start(context, endpoint):
        try:
            await _answer(context, endpoint, catalogue, list(kinds) or _kinds(body["env"]))
        except (asyncio.CancelledError, DeployError):
            context.console.log(
                f"{endpoint.name} ({endpoint.id}) is left as it is: run `up` again to go on, or `down {endpoint.name}`"
            )
            raise
    else:
        url = Site(context.client, endpoint).openai_url
        context.console.result(table({"Endpoint": f"{endpoint.name} ({endpoint.id})", "URL": url}))


def _can_start(context: Context, endpoint: Endpoint) -> bool:
    """Return whether the endpoint may have a worker; say so if it may not."""
    if endpoint.workers.max == 0:
        context.console.log("no worker can start while --workers-max is 0: there is no answer to wait for")
    return endpoint.workers.max != 0


def _check_is_given(model: str, options: Options) -> None:
    """Check that there are a model and an image.

    Raises:
        OptionError: one is missing.
    """
    if options.image is None:
        raise OptionError("name the worker's image with --image or VLLM_SERVERLESS_IMAGE (docs/deploy.md builds one)")
    if not model.strip():
        raise OptionError("name the model: a hub id, such as Qwen/Qwen3-8B, or a directory of the image")


def _check_is_for(endpoint: Endpoint, model: str) -> None:
    """Check that an endpoint whose name was derived from the model's is not one for something else.

    Raises:
        OptionError: it is.
    """
    serves = (endpoint.env or {}).get("MODEL_NAME")
    if serves != model:
        what = f"serves {serves}" if serves else f"runs {endpoint.image}, and names no model"
        raise OptionError(
            f"the endpoint {endpoint.name} ({endpoint.id}) {what}: give another --name, or `--name {endpoint.name}` to "
            f"change it to {model}"
        )


async def _choose(
    context: Context, options: Options, examined: Examined | None, existing: Endpoint | None
) -> tuple[Choice | None, list[GpuType]]:
    """Return the GPUs, None if they are not known, and the catalogue."""
    if not context.has_key:
        return choice.unchecked(options), []
    min_cuda = plan.min_cuda(options)
    return await choice.choose(options, examined, lambda count: context.api.gpus(min_cuda, count), existing)


async def _make(context: Context, existing: Endpoint | None, body: dict[str, Any], *, wait: bool) -> Endpoint | None:
    """Create the endpoint, or change what differs; None in a dry run."""
    if existing is None:
        check("CreateEndpointRequest", body)
        if context.dry_run:
            context.show_request("POST", "/v2/serverless", body)
            return None
        try:
            endpoint = await context.api.create(body)
        except asyncio.CancelledError:
            context.console.log(f"{body['name']} may have been created: look at `status`")
            raise
        context.console.log(f"{endpoint.name} is created: {endpoint.id}")
        return await _oldest_of_its_name(context, endpoint)
    changed = await rollout.change(context, existing, body, wait=wait)
    return None if context.dry_run else changed or existing


async def _oldest_of_its_name(context: Context, created: Endpoint) -> Endpoint:
    """Return the oldest endpoint with the name of a new one, which is deleted if it is another.

    The API has no unique names: two commands at once can each make one. Whichever lists last sees both.
    """
    same = [one for one in await context.api.endpoints() if same_name(one.name, created.name)]
    oldest = min(same, key=lambda one: (one.created_at, one.id), default=created)
    if oldest.id != created.id:
        await context.api.delete(created.id)
        context.console.log(f"another command has created {oldest.name} ({oldest.id}): {created.id} is deleted again")
    return oldest


def _examine(console: Console, model: str, revision: str | None, options: Options) -> Examined:
    """Ask the doctor."""
    console.log(f"checking {model} and its settings")
    kind = options.type or ""
    variables = plan.variables(
        model, replace(options, execution_timeout_s=None), kind, options.gpus_per_worker or 1, None
    )
    examined = examine(model, revision, variables)
    for note in examined.notes:
        console.log(note)
    return examined


def _show_without_pools(context: Context, body: dict[str, Any], examined: Examined | None) -> None:
    """Print the request of a dry run without a key, which cannot choose pools."""
    needed = "" if examined is None else f" of at least {examined.needs.fit(None).min_gpu_memory_bytes / 2**30:.1f} GiB"
    body["gpu"] = {"pools": [f"(the cheapest{needed})"], **body["gpu"]}
    check("CreateEndpointRequest", body)
    context.console.log(f"{KEY_VARIABLE} is not set: prices and stock are not known; --gpu names pools")
    context.show_request("POST", "/v2/serverless", body)


def _kinds(env: dict[str, str]) -> list[str]:
    """Return the kinds of requests that the model may answer, by its settings."""
    is_pooling = env.get("RUNNER") == "pooling" or env.get("CONVERT", "none") not in ("none", "auto")
    return ["embedding"] if is_pooling else list(KINDS)


async def _answer(context: Context, endpoint: Endpoint, catalogue: Sequence[GpuType], kinds: list[str]) -> None:
    """Send the first request, watch the workers start meanwhile, and print how to go on."""
    console = context.console
    site = Site(context.client, endpoint)
    console.log("the first request is sent; it waits for a worker")
    progress = console.progress(PHASES)
    watcher = StartWatcher(context.api, endpoint.id, console, progress, poll_s=context.poll_s)
    request = asyncio.create_task(site.ask(kinds))
    try:
        await rollout.first_of(request, asyncio.create_task(watcher.watch()), context.timeout_s)
        answer = request.result()
        progress.reach(REQUEST)
        progress.end()
    except TimeoutError:
        if watcher.waiting_for_capacity:
            raise CapacityError(
                f"no GPU was free for {context.timeout_s:.0f} s: add pools with --gpu, or allow other data centers"
            ) from None
        raise CapacityError(
            f"no answer after {context.timeout_s:.0f} s in the phase `{progress.phase}`: look at `logs "
            f"{endpoint.name}`, and give a longer --timeout if it only takes time"
        ) from None
    finally:
        progress.close()
        with suppress(Exception):
            await asyncio.shield(site.cancel())
    cold_start = await site.cold_start()
    price = report.price(endpoint, catalogue, watcher.gpu_type)
    for text in report.ready(endpoint, site, answer, progress.durations_s, cold_start, price):
        console.result(text)
