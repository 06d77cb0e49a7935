"""The streams to compare: requests, each with the tokens of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.parsers.apps import BASE, model_of
from tests.parsers.samples import (
    ANSWER,
    FIRST,
    PLAIN,
    PLAIN_SEED,
    REASONING,
    REASONING_SAMPLES,
    SECOND,
    TOOL_SAMPLES,
    TOOLS,
    Sample,
)

CHAT, COMPLETION, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
CONVERSATION: list[dict[str, Any]] = [{"role": "user", "content": "How is it there?"}]
USAGE = {"include_usage": True}
_WEATHER: dict[str, Any] = TOOLS[0]["function"]


@dataclass(frozen=True)
class Case:
    """A stream: the request, and the tokens of its answer.

    Attributes:
        route: where the request goes.
        answer: as in a sample.
        body: the rest of the request.
        exactly: whether the events must be equal; if not, their joined content, and the request is for plain text.
    """

    route: str
    answer: str | list[str | int]
    body: dict[str, Any]
    exactly: bool = True

    def request(self, model: Path) -> dict[str, Any]:
        """Return the complete request, for the model in this directory."""
        tokens = "max_output_tokens" if self.route == RESPONSES else "max_tokens"
        forced = {"vllm_xargs": {"token_ids": ids(self.answer, model)}} if self.exactly else {"seed": PLAIN_SEED}
        return {"model": BASE, "stream": True, "temperature": 0, tokens: 900, **forced, **self.body}


def ids(answer: str | list[str | int], model: Path) -> list[int]:
    """Return the token ids of an answer, including the one that ends it."""
    parts = [answer] if isinstance(answer, str) else answer
    tokenizer = _tokenizer(model)
    found: list[int] = []
    for part in parts:
        found += [part] if isinstance(part, int) else tokenizer.encode(part, add_special_tokens=False).ids
    return [*found, tokenizer.token_to_id("<|im_end|>")]


@cache
def _tokenizer(model: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


def _chat(sample: Sample, model: str, **more: Any) -> Case:
    return Case(
        CHAT,
        sample.answer,
        {"model": model, "messages": CONVERSATION, "stream_options": USAGE, **sample.request, **more},
    )


def _plain(route: str, *, exactly: bool = True, **more: Any) -> Case:
    question = {"messages": CONVERSATION} if route == CHAT else {"prompt": "How is it there?"}
    return Case(route, PLAIN, {**question, "stream_options": USAGE, **more}, exactly)


# Parsers that models use together: the reasoning of one, then the tool calls of the other.
FAMILIES = [
    ("hermes", "deepseek_r1"),
    ("qwen3_coder", "qwen3"),
    ("qwen3_json", "qwen3"),
    ("ling3", "ling3"),
    ("kimi_k2", "kimi_k2"),
    ("kimi_k3", "kimi_k3"),
    ("deepseek_v31", "deepseek_v3"),
    ("deepseek_v4", "deepseek_v4"),
    ("seed_oss", "seed_oss"),
    ("minimax_m2", "minimax_m2"),
    ("mistral", "mistral"),
    ("gemma4", "gemma4"),
    ("ernie45", "ernie45"),
    ("hy_v3", "hy_v3"),
    ("step3p5", "step3p5"),
    ("xlam", "granite"),
    ("hf", "hf"),
]


def _family(tool: str, reasoning: str) -> Case:
    sample = REASONING_SAMPLES[reasoning]
    reasoning_text, call = sample.answer, TOOL_SAMPLES[tool].answer
    assert isinstance(reasoning_text, str)
    assert isinstance(call, str)
    return _chat(
        Sample(reasoning_text.partition(ANSWER)[0] + call, sample.request), model_of(tool, reasoning), tools=TOOLS
    )


_HERMES = model_of("hermes", "qwen3")
_REASONING_AND_CALL = f"<think>\n{REASONING}\n</think>\n\n{TOOL_SAMPLES['hermes'].answer}"
_REQUIRED = f'[{{"name": "weather", "parameters": {FIRST}}}, {{"name": "weather", "parameters": {SECOND}}}]'
_NAMED = {"type": "function", "function": {"name": "weather"}}
_ANTHROPIC = {"name": "weather", "description": _WEATHER["description"], "input_schema": _WEATHER["parameters"]}

TOOL_CASES = {f"tool {name}": _chat(one, model_of(tool=name), tools=TOOLS) for name, one in TOOL_SAMPLES.items()}
REASONING_CASES = {f"reasoning {name}": _chat(one, model_of(reasoning=name)) for name, one in REASONING_SAMPLES.items()}
FAMILY_CASES = {f"family {tool} {reasoning}": _family(tool, reasoning) for tool, reasoning in FAMILIES}
OTHER_CASES = {
    "a chat": _plain(CHAT, exactly=False),
    "a completion": _plain(COMPLETION, exactly=False),
    "a chat, n": _plain(CHAT, exactly=False, n=2, temperature=1),
    "a completion, n": _plain(COMPLETION, exactly=False, n=2, temperature=1),
    "a chat, logprobs": _plain(CHAT, logprobs=True),
    "a chat, top_logprobs": _plain(CHAT, logprobs=True, top_logprobs=3),
    "a completion, logprobs": _plain(COMPLETION, logprobs=3),
    "a chat, token ids": _plain(CHAT, return_token_ids=True),
    "a completion, token ids": _plain(COMPLETION, return_token_ids=True),
    "a chat, a stop string": _plain(CHAT, stop=["that is", "nothing of it"]),
    "a chat, a stop string that stays": _plain(CHAT, stop=["more, a"], include_stop_str_in_output=True),
    "a completion, a stop string": _plain(COMPLETION, stop=[" all"]),
    "a chat, continuous usage": _plain(CHAT, stream_options={**USAGE, "continuous_usage_stats": True}),
    "a completion, continuous usage": _plain(COMPLETION, stream_options={**USAGE, "continuous_usage_stats": True}),
    "tools and reasoning, n": _chat(Sample(_REASONING_AND_CALL), _HERMES, tools=TOOLS, n=2, temperature=1),
    "tools and reasoning, logprobs": _chat(Sample(_REASONING_AND_CALL), _HERMES, tools=TOOLS, logprobs=True),
    "tools, required": _chat(Sample(_REQUIRED), model_of("xlam"), tools=TOOLS, tool_choice="required"),
    "tools, named": _chat(Sample(FIRST), model_of("xlam"), tools=TOOLS, tool_choice=_NAMED),
    "tools, named, in the model's own form": _chat(
        Sample(f'<tool_call>\n{{"name": "weather", "arguments": {FIRST}}}\n</tool_call>'),
        model_of("qwen3_json"),
        tools=TOOLS,
        tool_choice=_NAMED,
    ),
    "responses, plain": Case(RESPONSES, PLAIN, {"input": CONVERSATION}),
    "responses, tools and reasoning": Case(
        RESPONSES,
        _REASONING_AND_CALL,
        {"model": _HERMES, "input": CONVERSATION, "tools": [{"type": "function", **_WEATHER}]},
    ),
    "responses, tools, xlam": Case(
        RESPONSES,
        TOOL_SAMPLES["xlam"].answer,
        {"model": model_of("xlam"), "input": CONVERSATION, "tools": [{"type": "function", **_WEATHER}]},
    ),
    "messages, plain": Case(MESSAGES, PLAIN, {"messages": CONVERSATION}),
    "messages, tools and reasoning": Case(
        MESSAGES, _REASONING_AND_CALL, {"model": _HERMES, "messages": CONVERSATION, "tools": [_ANTHROPIC]}
    ),
    "messages, tools, xlam": Case(
        MESSAGES,
        TOOL_SAMPLES["xlam"].answer,
        {"model": model_of("xlam"), "messages": CONVERSATION, "tools": [_ANTHROPIC]},
    ),
}
CASES = {**TOOL_CASES, **REASONING_CASES, **FAMILY_CASES, **OTHER_CASES}
