"""Variants of vLLM's app over one engine: the `model` of a request selects the parsers, in the form of `model_of`."""

from __future__ import annotations

import asyncio
import copy
import json
from argparse import Namespace
from typing import Any

from engine.backend.app import App, Message, Receive, Send

BASE = "tiny"


def model_of(tool: str | None = None, reasoning: str | None = None) -> str:
    """Return the model name that selects these parsers."""
    return f"{BASE}+{tool or ''}+{reasoning or ''}"


def arguments_of(model: str, base: Namespace) -> Namespace:
    """Return the arguments of `vllm serve` for this model name: `base` with other parsers."""
    args = copy.copy(base)
    _, tool, reasoning = model.split("+")
    args.served_model_name = [model]
    if tool:
        args.tool_call_parser, args.enable_auto_tool_choice = tool, True
    if reasoning:
        args.structured_outputs_config = copy.copy(base.structured_outputs_config)
        args.reasoning_parser = args.structured_outputs_config.reasoning_parser = reasoning
    return args


class ByModel:
    """A middleware for vLLM's own server (`--middleware`) that routes a request to the app of its `model`.

    An app is made like the server's own, at the first request for it.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._apps: dict[str, App] = {}
        self._lock = asyncio.Lock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Read the body and pass it on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        model = str(json.loads(body).get("model"))
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        app = self._app if model == BASE else await self._app_of(model, scope["app"].state)
        await app(scope, receive_again, send)

    async def _app_of(self, model: str, state: Any) -> App:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        async with self._lock:
            if model not in self._apps:
                args = arguments_of(model, state.args)
                args.middleware = []
                tasks = await state.engine_client.get_supported_tasks()
                app = build_app(args, tasks, state.engine_client.model_config)
                await init_app_state(state.engine_client, app.state, args, tasks)
                self._apps[model] = app
            return self._apps[model]
