"""Runs one job on this machine, without a queue, and prints its text, its result and its speed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigurationError, error_text
from engine.jobs import deltas

if TYPE_CHECKING:
    from engine.backend.vllm_engine import VLLMEngine

Handler = Callable[[dict[str, Any]], AsyncGenerator[Any, None]]


def read_job(text: str) -> dict[str, Any]:
    """Return the job of a JSON text, with an id if it has none.

    Raises:
        ConfigurationError: the text is not a JSON object.
    """
    try:
        job = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"The test input is not JSON: {error}") from None
    if not isinstance(job, dict):
        raise ConfigurationError('The test input must be a JSON object: {"input": {...}}')
    return {"id": "local", **job}


async def answer(job: dict[str, Any], handler: Handler, engine: VLLMEngine) -> int:
    """Run the job and print its text as it is generated, the job as `/status` would return it, and its speed.

    Returns:
        The exit status: 0 if the job completed, 1 if it failed.
    """
    await engine.app()
    outputs: list[Any] = []
    tokens_before = engine.statistics.generation_tokens
    started_at = time.monotonic()
    first_s: float | None = None
    async for output in handler(job):
        first_s = first_s if first_s is not None else time.monotonic() - started_at
        outputs.append(output)
        _print(_text(output))
    duration_s = time.monotonic() - started_at
    tokens = engine.statistics.generation_tokens - tokens_before

    error = error_text(outputs[-1]) if outputs else None
    status: dict[str, Any] = {"id": job["id"], "status": "COMPLETED" if error is None else "FAILED"}
    if error is not None:
        outputs.pop()
        status["error"] = error
    _print("\n" + json.dumps(status | {"output": outputs}, ensure_ascii=False) + "\n")
    rate = tokens / duration_s if duration_s else 0.0
    _print(f"{tokens} tokens, the first after {first_s or 0.0:.3f} s, {rate:.1f} tokens/s\n")
    return int(error is not None)


def _text(output: Any) -> str:
    """Return the readable text of an output."""
    if isinstance(output, str):
        return "".join(delta["text"] for delta in deltas.from_events(output)) if output.startswith("data:") else output
    if not isinstance(output, dict):
        return ""
    if "text" in output:
        return str(output["text"])
    choices = output.get("choices") or []
    return "".join(str((choice.get("message") or {}).get("content") or choice.get("text") or "") for choice in choices)


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
