"""The worker, with as many servers over its one engine as there are combinations of parsers that jobs ask for."""

from __future__ import annotations

import asyncio
import copy
import sys
from collections.abc import AsyncGenerator
from typing import Any

import handler
from engine.backend.inline_executor import InPlace
from engine.backend.vllm_engine import Server
from engine.jobs import pipeline
from tests.parsers.apps import BASE, arguments_of

_run = pipeline.run
_servers: dict[str, Server] = {}


def server_of(job: dict[str, Any], base: Server) -> Server:
    """The server that the job's `model` stands for: the base but for the parsers and the app."""
    model = job["input"].get("openai_input", {}).get("model", BASE)
    if model == BASE:
        return base
    if model not in _servers:
        server = _servers[model] = copy.copy(base)
        server._args = arguments_of(model, base._args)
        server._app = None
        server._lock = asyncio.Lock()
        executor = base._engine.renderer._executor
        if isinstance(executor._inner, InPlace):  # The app that is made now puts it there again.
            executor._inner = executor._inner._threads
    return _servers[model]


def run(job: dict[str, Any], engine: Server) -> AsyncGenerator[Any, None]:
    """Run the job on its server."""
    return _run(job, server_of(job, engine))


if __name__ == "__main__":
    vars(pipeline)["run"] = run
    sys.exit(handler.main())
