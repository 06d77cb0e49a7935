"""The worker, with as many servers over its one engine as there are combinations of parsers that jobs ask for."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import sys
from collections.abc import AsyncGenerator
from typing import Any

import handler
from engine.backend.inline_executor import InlineExecutor
from engine.backend.vllm_engine import VLLMEngine
from engine.jobs import pipeline
from tests.parsers.apps import BASE, arguments_of

_run = pipeline.run
_servers: dict[str, VLLMEngine] = {}


def server_of(job: dict[str, Any], base: VLLMEngine) -> VLLMEngine:
    """The server that the job's `model` stands for: the base but for the parsers and the app."""
    model = job["input"].get("openai_input", {}).get("model", BASE)
    if model == BASE:
        return base
    if model not in _servers:
        server = _servers[model] = copy.copy(base)
        configuration = base._configuration
        server._configuration = dataclasses.replace(configuration, args=arguments_of(model, configuration.args))
        server._app = None
        server._app_lock = asyncio.Lock()
        executor = base._engine.renderer._executor
        if isinstance(executor._inner, InlineExecutor):  # The app that is made now puts it there again.
            executor._inner = executor._inner._threads
    return _servers[model]


def run(job: dict[str, Any], engine: VLLMEngine) -> AsyncGenerator[Any, None]:
    """Run the job on its server."""
    return _run(job, server_of(job, engine))


if __name__ == "__main__":
    vars(pipeline)["run"] = run
    sys.exit(handler.main())
