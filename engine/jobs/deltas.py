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
from engine.jobs.event_batcher import ENVELOPE_BYTES
from engine.json_codec import encode

# What of a delta may be cut between two outputs.
_CUT = {"text", "reasoning", "tool_calls", "logprobs", "token_ids"}


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


def split(delta: Delta, max_bytes: int) -> Iterator[Delta]:
    """Return the delta in pieces that are small enough to be posted, in order; joined, they are the delta.

    What cannot be cut, as one token with its log-probabilities, stays as large as it is.

    Args:
        delta: of one choice.
        max_bytes: the most that a piece may have as the body of a post.
    """
    halves = () if len(encode(delta)) + ENVELOPE_BYTES <= max_bytes else _halves(delta)
    if halves:
        for half in halves:
            yield from split(half, max_bytes)
    else:
        yield delta


def _halves(delta: Delta) -> tuple[Delta, ...]:
    """Return both halves of all that can be cut, what ends the choice in the second; nothing if nothing can be cut."""
    first, second = Delta(index=delta["index"], text="", finish_reason=None), delta.copy()
    cut = False
    for name, value in delta.items():
        if name in _CUT:
            one, other = _cut(value)
            if one and other:
                cut = True
                first[name], second[name] = one, other  # type: ignore[literal-required]
    return (first, second) if cut else ()


def _cut(value: Any) -> tuple[Any, Any]:
    """Return two halves of a text, a list, or each list of an object; the first is empty where there is nothing to cut.

    A single call of a tool is cut in its arguments, as vLLM streams them.
    """
    if isinstance(value, dict):
        both = {name: _cut(part or []) for name, part in value.items()}
        first = {name: one for name, (one, _) in both.items() if one}
        return first, {name: other or None for name, (_, other) in both.items()}
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        call = value[0]
        one, other = _cut((call.get("function") or {}).get("arguments") or "")
        if not one:
            return [], value
        rest = {"index": call["index"]} if "index" in call else {}
        return [call | {"function": call["function"] | {"arguments": one}}], [rest | {"function": {"arguments": other}}]
    middle = len(value) // 2
    return value[:middle], value[middle:]


def error_in(batch: str) -> RefusedError | None:
    """The error that a stream of any of vLLM's routes ends with in this batch, if it does.

    OpenAI's chats and completions, and Anthropic's messages, have an event with `error`; responses have one of the type
    `response.failed`. That it is an error shows in its JSON: quotes within a text are escaped.
    """
    if '"error"' in batch or "response.failed" in batch:
        with suppress(ValueError):  # A piece of a large event: an error is none.
            for event in events(batch):
                if event.get("type") == "response.failed":
                    error = (event.get("response") or {}).get("error")
                    return _refusal(error or {"message": "vLLM reported that the response failed, without a reason"})
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
