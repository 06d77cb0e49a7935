"""A short request before the first job, so that what FlashBoot freezes has served one (`WARM_UP`)."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from engine.errors import error_text
from engine.jobs import pipeline

JOB_ID = "warm-up"
# On a GPU, a first request may compile kernels for minutes.
TIMEOUT_S = 300.0
# Tried in this order: a model may have the first route and no chat template.
_REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "stream": True}),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 2, "stream": True}),
    ("/v1/embeddings", {"input": "Hello"}),
)

_log = logging.getLogger(__name__)


async def run(engine: pipeline.Engine) -> None:
    """Run the first request that the model answers; log what came of it. The worker serves in any case."""
    begun = time.monotonic()
    refusals: list[str] = []
    try:
        async with asyncio.timeout(TIMEOUT_S):
            for route, body in _REQUESTS:
                if not engine.has_route(route):
                    continue
                job = {"id": JOB_ID, "input": {"openai_route": route, "openai_input": body}}
                outputs = [output async for output in pipeline.run(job, engine)]
                if outputs and (error := error_text(outputs[-1])) is None:
                    _log.info("Warm-up: %s answered after %.3f s", route, time.monotonic() - begun)
                    return
                refusals.append(f"{route}: {error if outputs else 'no answer'}")
    except TimeoutError:
        refusals.append(f"no answer within {TIMEOUT_S:.0f} s")
    _log.warning("Warm-up: no request was answered (%s)", "; ".join(refusals) or "there is none for this kind of model")
