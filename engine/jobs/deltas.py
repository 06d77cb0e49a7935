"""Streams of top-level jobs: vLLM's events become dicts with the new text, so that nobody has to parse SSE.

A dict holds what one batch brought for one choice, a `Delta`; the last one of a job also holds `usage`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
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
        raise _refusal(error["error"])


def error_in(batch: str) -> RefusedError | None:
    """The error that a stream of any of vLLM's routes ends with in this batch, if it does.

    OpenAI's chats and completions, and Anthropic's messages, have an event with `error`; responses have one of the type
    `response.failed`. That it is an error shows in its JSON: quotes within a text are escaped.
    """
    if '"error"' in batch or "response.failed" in batch:
        with suppress(ValueError):  # A piece of a large event: an error is none.
            for event in events(batch):
                if event.get("type") == "response.failed":
                    return _refusal((event.get("response") or {}).get("error"))
                if event.get("error"):
                    return _refusal(event["error"])
    return None


def answer(document: Any, warnings: tuple[str, ...] = ()) -> Any:
    """The answer to a native job that does not stream: vLLM's, with what earlier worker-vllm called its parts.

    RunPod's package for LangChain reads `choices[].tokens` (texts), `usage.input` and `usage.output`.

    Args:
        document: vLLM's answer.
        warnings: what was ignored in the job's input.
    """
    if isinstance(document, dict) and warnings:
        document["warnings"] = list(warnings)
    if isinstance(document, dict) and isinstance(document.get("choices"), list):
        for choice in document["choices"]:
            choice["tokens"] = [choice.get("text") or (choice.get("message") or {}).get("content") or ""]
        if usage := document.get("usage"):
            usage |= {"input": usage.get("prompt_tokens", 0), "output": usage.get("completion_tokens", 0)}
    return document


def _refusal(error: Any) -> RefusedError:
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) else HTTPStatus.INTERNAL_SERVER_ERROR.value
    return RefusedError(status, {"error": error})


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
