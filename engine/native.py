"""Streams of top-level jobs: vLLM's events become dicts with the new text, so that nobody has to parse SSE.

A dict holds what one batch brought for one choice, a `Delta`; the last one of a job also holds `usage`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, NotRequired, TypedDict

from engine.errors import RefusedError


class Delta(TypedDict):
    """What is new of one choice; all but the first three only where the engine sent it."""

    index: int
    text: str
    finish_reason: str | None
    stop_reason: NotRequired[int | str]
    """The stop string or token id that ended it."""
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    logprobs: NotRequired[dict[str, Any]]
    """OpenAI's object of this route, for all new tokens: its lists hold one item a token."""
    token_ids: NotRequired[list[int]]
    usage: NotRequired[dict[str, Any]]
    warnings: NotRequired[list[str]]
    """What was ignored in the job's input; beside `usage`."""


def deltas(batch: str, warnings: tuple[str, ...] = ()) -> Iterator[Delta]:
    """The dicts for one batch of complete events: one for each choice with something new, in order of their index.

    Raises:
        RefusedError: one of the events is an error, the engine's own; what came before it has been given then.
    """
    choices: dict[int, Delta] = {}
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    for event in events(batch):
        if "error" in event:
            error = event
            break
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            merged = choices.setdefault(choice["index"], Delta(index=choice["index"], text="", finish_reason=None))
            _merge(merged, choice)
    found = [choices[index] for index in sorted(choices) if _has_news(choices[index])]
    if usage:
        found = found or [Delta(index=0, text="", finish_reason=None)]
        found[-1]["usage"] = usage
        if warnings:
            found[-1]["warnings"] = list(warnings)
    yield from found
    if error is not None:
        code = error["error"].get("code") if isinstance(error["error"], dict) else None
        raise RefusedError(code if isinstance(code, int) else HTTPStatus.INTERNAL_SERVER_ERROR.value, error)


def events(batch: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of the `data:` lines of server-sent events; the closing `[DONE]` is left out."""
    # By line feeds alone: `splitlines` would also cut at separators that JSON text may hold as they are.
    for line in batch.split("\n"):
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


def _merge(merged: Delta, choice: dict[str, Any]) -> None:
    delta = choice.get("delta") or {}
    merged["text"] += choice.get("text") or delta.get("content") or ""
    if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
        merged["reasoning"] = merged.get("reasoning", "") + reasoning
    if calls := delta.get("tool_calls"):
        merged.setdefault("tool_calls", []).extend(calls)
    if logprobs := choice.get("logprobs"):
        merged["logprobs"] = _one_after_the_other(merged.get("logprobs", {}), logprobs)
    if token_ids := choice.get("token_ids"):
        merged.setdefault("token_ids", []).extend(token_ids)
    if (stop_reason := choice.get("stop_reason")) is not None:
        merged["stop_reason"] = stop_reason
    merged["finish_reason"] = choice.get("finish_reason") or merged["finish_reason"]


def _one_after_the_other(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The lists of two objects joined: `content` of a chat, `tokens`, `token_logprobs`, … of a completion."""
    both = {name: (first.get(name) or []) + (second.get(name) or []) for name in {**first, **second}}
    return {name: items or None for name, items in both.items()}


def _has_news(merged: Delta) -> bool:
    return any(value for name, value in merged.items() if name != "index")
