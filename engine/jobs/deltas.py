"""Turns vLLM's events into dicts with the new text, for streamed top-level jobs: their clients need not parse SSE.

A dict, a `Delta`, has what one batch brought for one choice; the last one of a job also has `usage`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from typing import Any, NotRequired, TypedDict

from engine.errors import EngineResponseError
from engine.jobs.event_batcher import ENVELOPE_BYTES
from engine.json_codec import encode

# Fields that may be split between two outputs.
_SPLITTABLE = {"text", "reasoning", "tool_calls", "logprobs", "token_ids"}


class Delta(TypedDict):
    """The new part of one choice; all but the first three fields only if the engine sent them."""

    index: int
    text: str
    finish_reason: str | None
    stop_reason: NotRequired[int | str]
    """The stop string or token id that ended it."""
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    logprobs: NotRequired[dict[str, Any]]
    """OpenAI's object of this route for all new tokens: its lists have one item per token."""
    token_ids: NotRequired[list[int]]
    usage: NotRequired[dict[str, Any]]
    warnings: NotRequired[list[str]]
    """What was ignored in the job's input; in the first dict of the stream."""


def from_events(batch: str) -> Iterator[Delta]:
    """Yield the dicts of one batch of complete events: one for each choice with new content, ordered by index.

    Raises:
        EngineResponseError: one of the events is an error of the engine; what came before it has been yielded.
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
    found = [choices[index] for index in sorted(choices) if _is_nonempty(choices[index])]
    if usage:
        found = found or [Delta(index=0, text="", finish_reason=None)]
        found[-1]["usage"] = usage
    yield from found
    if error is not None:
        raise _engine_error(error["error"])


def split(delta: Delta, max_bytes: int) -> Iterator[Delta]:
    """Yield the delta in parts that are small enough to be posted; concatenated, they are the delta.

    What cannot be split, as one token with its log-probabilities, stays as it is.

    Args:
        delta: of one choice.
        max_bytes: maximum size of a part as the body of a post.
    """
    halves = () if len(encode(delta)) + ENVELOPE_BYTES <= max_bytes else _halves(delta)
    if halves:
        for half in halves:
            yield from split(half, max_bytes)
    else:
        yield delta


def _halves(delta: Delta) -> tuple[Delta, ...]:
    """Return both halves, with the end of the choice in the second one; nothing if no field can be split."""
    first, second = Delta(index=delta["index"], text="", finish_reason=None), delta.copy()
    is_split = False
    for name, value in delta.items():
        if name in _SPLITTABLE:
            one, other = _split_tool_calls(delta["tool_calls"]) if name == "tool_calls" else _split_value(value)
            if one and other:
                is_split = True
                first[name], second[name] = one, other  # type: ignore[literal-required]
    return (first, second) if is_split else ()


def _split_tool_calls(calls: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Return two halves of a list of tool calls; a single one is split in its arguments, as vLLM streams them."""
    if len(calls) > 1:
        return _split_value(calls)
    (call,) = calls
    one, other = _split_value((call.get("function") or {}).get("arguments") or "")
    if not one:
        return [], calls
    rest = {"index": call["index"]} if "index" in call else {}
    return [call | {"function": call["function"] | {"arguments": one}}], [rest | {"function": {"arguments": other}}]


def _split_value(value: Any) -> tuple[Any, Any]:
    """Return two halves of a text, a list, or each list of an object; the first is empty if there is only one item."""
    if isinstance(value, dict):
        both = {name: _split_value(part or []) for name, part in value.items()}
        first = {name: one for name, (one, _) in both.items() if one}
        return first, {name: other or None for name, (_, other) in both.items()}
    middle = len(value) // 2
    return value[:middle], value[middle:]


def error_in(batch: str) -> EngineResponseError | None:
    """Return the error that a stream of any of vLLM's routes ends with in this batch, or None.

    OpenAI's chats and completions, and Anthropic's messages, send an event with `error`; responses send one of the type
    `response.failed`. The search for the words is exact enough: quotes within a text are escaped.
    """
    if '"error"' in batch or "response.failed" in batch:
        with suppress(ValueError):  # A piece of a large event, which is not an error.
            for event in events(batch):
                if event.get("type") == "response.failed":
                    error = (event.get("response") or {}).get("error")
                    return _engine_error(
                        error or {"message": "vLLM reported that the response failed, without a reason"}
                    )
                if event.get("error"):
                    return _engine_error(event["error"])
    return None


def add_worker_vllm_fields(document: Any, warnings: tuple[str, ...] = ()) -> Any:
    """Add earlier worker-vllm's field names to the response of a top-level job that does not stream.

    RunPod's package for LangChain reads `choices[].tokens` (texts), `usage.input` and `usage.output`.

    Args:
        document: vLLM's response.
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


def _engine_error(error: Any) -> EngineResponseError:
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) else HTTPStatus.INTERNAL_SERVER_ERROR.value
    return EngineResponseError(status, {"error": error})


def events(batch: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of the `data:` lines of server-sent events, without the final `[DONE]`."""
    # Split at line feeds only: `splitlines` also splits at separators that are allowed in JSON text.
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
        merged["logprobs"] = _concat_logprobs(merged.get("logprobs", {}), logprobs)
    if token_ids := choice.get("token_ids"):
        merged.setdefault("token_ids", []).extend(token_ids)
    if (stop_reason := choice.get("stop_reason")) is not None:
        merged["stop_reason"] = stop_reason
    merged["finish_reason"] = choice.get("finish_reason") or merged["finish_reason"]


def _concat_logprobs(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Concatenate the lists of two objects: `content` of a chat, `tokens`, `token_logprobs`, … of a completion."""
    both = {name: (first.get(name) or []) + (second.get(name) or []) for name in {**first, **second}}
    return {name: items or None for name, items in both.items()}


def _is_nonempty(merged: Delta) -> bool:
    return any(value for name, value in merged.items() if name != "index")
