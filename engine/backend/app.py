"""vLLM's own OpenAI app over its engine: made, started and searched for routes. Needs no socket and no server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from starlette.routing import Match

from engine.backend import compat, lora
from engine.cold_start import WORKER

if TYPE_CHECKING:
    from starlette.applications import Starlette

# ASGI 3, as the job side calls it. Not starlette's types: a task needs a coroutine, not any awaitable.
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Coroutine[Any, Any, None]]


async def build_app(engine: Any, args: Any, *, with_metrics: bool) -> Any:
    """Return vLLM's OpenAI app, initialised but not started, with the worker's own route `/cold_start`.

    Args:
        engine: vLLM's `AsyncLLM`.
        args: of `vllm serve`.
        with_metrics: whether jobs may read `/metrics`.
    """
    from vllm.entrypoints.launchers import app as launcher
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    tasks = await engine.get_supported_tasks()
    lora.accept_model_names(tuple(args.served_model_name))
    app = launcher.build_app(args, tasks, engine.model_config)
    app.add_api_route("/cold_start", WORKER.document)
    if not with_metrics:
        compat.remove_unused_middleware(app)
    await init_app_state(engine, app.state, args, tasks)
    compat.list_one_name(app.state)
    # vLLM's error handler ends the server that it finds here when the engine is dead. The job loop ends the worker.
    app.state.server = SimpleNamespace(should_exit=False)
    return app


async def run_lifespan(app: Starlette) -> asyncio.Task[None]:
    """Start the app's lifespan, as a server does; it runs until the task is cancelled.

    It is a task of its own because an event loop that closes cancels its tasks first, and so the lifespan ends from the
    inside out. As open generators, its contexts would end in any order, with errors.

    Returns:
        The task, for the caller to keep a reference to.
    """
    started = asyncio.Event()

    async def live() -> None:
        try:
            async with app.router.lifespan_context(app):
                started.set()
                await asyncio.Event().wait()
        finally:
            started.set()

    task = asyncio.create_task(live(), name="the app's lifespan")
    await started.wait()
    if task.done():
        await task
    return task


def has_route(app: Any, path: str) -> bool:
    """Return whether the app has a route of this path, for any method or a WebSocket, or something mounted there."""
    scopes = [
        {"type": kind, "method": "GET", "path": one, "root_path": ""}
        for kind in ("http", "websocket")
        for one in (path, f"{path}/")
    ]
    return any(route.matches(scope)[0] is not Match.NONE for route in app.routes for scope in scopes)
