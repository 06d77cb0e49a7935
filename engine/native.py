"""Streams of top-level jobs: vLLM's events become dicts with the new text, so that nobody has to parse SSE.

A dict holds what one batch brought for one choice:
`{"index": 0, "text": "new text", "finish_reason": null}`, and where the engine sent them `reasoning`, `tool_calls` and
`logprobs`. The last one of a job also holds `usage`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from engine.errors import RefusedError


def deltas(batch: str) -> list[dict[str, Any]]:
    """The dicts for one batch of complete events: one for each choice with something new, in order of their index.

    Raises:
        RefusedError: one of the events is an error; it is the engine's own.
    """
    choices: dict[int, dict[str, Any]] = {}
    usage: dict[str, Any] | None = None
    for event in events(batch):
        if "error" in event:
            code = event["error"].get("code") if isinstance(event["error"], dict) else None
            raise RefusedError(code if isinstance(code, int) else HTTPStatus.INTERNAL_SERVER_ERROR.value, event)
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            merged = choices.setdefault(choice["index"], {"index": choice["index"], "text": "", "finish_reason": None})
            _merge(merged, choice)
    found = [choices[index] for index in sorted(choices) if _has_news(choices[index])]
    if usage:
        found = found or [{"index": 0, "text": "", "finish_reason": None}]
        found[-1]["usage"] = usage
    return found


def events(batch: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of the `data:` lines of server-sent events; the closing `[DONE]` is left out."""
    # By line feeds alone: `splitlines` would also cut at separators that JSON text may hold as they are.
    for line in batch.split("\n"):
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


def _merge(merged: dict[str, Any], choice: dict[str, Any]) -> None:
    delta = choice.get("delta") or {}
    merged["text"] += choice.get("text") or delta.get("content") or ""
    if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
        merged["reasoning"] = merged.get("reasoning", "") + reasoning
    if calls := delta.get("tool_calls"):
        merged.setdefault("tool_calls", []).extend(calls)
    if logprobs := choice.get("logprobs"):
        merged.setdefault("logprobs", []).append(logprobs)
    merged["finish_reason"] = choice.get("finish_reason") or merged["finish_reason"]


def _has_news(merged: dict[str, Any]) -> bool:
    return any(value for name, value in merged.items() if name != "index")
