"""The worker, with one app for each combination of parsers that jobs select, all over one engine."""

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
_engines: dict[str, VLLMEngine] = {}


def engine_of(job: dict[str, Any], base: VLLMEngine) -> VLLMEngine:
    """Return the engine for the job's `model`: a copy of `base` with other parsers and another app."""
    model = job["input"].get("openai_input", {}).get("model", BASE)
    if model == BASE:
        return base
    if model not in _engines:
        variant = _engines[model] = copy.copy(base)
        configuration = base._configuration
        variant._configuration = dataclasses.replace(configuration, args=arguments_of(model, configuration.args))
        variant._app = None
        variant._app_lock = asyncio.Lock()
        executor = base._engine.renderer._executor
        if isinstance(executor._inner, InlineExecutor):  # The app of the variant installs it again.
            executor._inner = executor._inner._threads
    return _engines[model]


def run(job: dict[str, Any], engine: VLLMEngine) -> AsyncGenerator[Any, None]:
    """Run the job on the engine of its `model`."""
    return _run(job, engine_of(job, engine))


if __name__ == "__main__":
    vars(pipeline)["run"] = run
    sys.exit(handler.main())
