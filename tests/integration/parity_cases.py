"""The requests that are sent both through the queue and directly to vLLM: tables for each kind of model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builder.tiny_model.corpus import example

MODEL = "tiny"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Case:
    """A request: a POST of the body, or a GET if there is none."""

    route: str
    body: dict[str, Any] | None = None

    @property
    def streams(self) -> bool:
        return bool(self.body and self.body.get("stream"))

    def streamed(self, **more: Any) -> Case:
        """Return the same request with `stream`."""
        return Case(self.route, {**(self.body or {}), "stream": True, **more})


def user_turn(text: str, *before: dict[str, Any]) -> list[dict[str, Any]]:
    return [*before, {"role": "user", "content": text}]


def chat(name: str, **more: Any) -> Case:
    return Case("/v1/chat/completions", {**GREEDY, "messages": example(name).messages, "max_tokens": 900, **more})


def completion(name: str, **more: Any) -> Case:
    return Case("/v1/completions", {**GREEDY, "prompt": example(name).prompt, "max_tokens": 200, **more})


def response(name: str, **more: Any) -> Case:
    return Case("/v1/responses", {**GREEDY, "input": example(name).messages, "max_output_tokens": 400, **more})


def message(name: str, **more: Any) -> Case:
    turns = example(name).messages
    system = {"system": turns.pop(0)["content"]} if turns[0]["role"] == "system" else {}
    return Case("/v1/messages", {**GREEDY, "messages": turns, "max_tokens": 400, **system, **more})


def count(**more: Any) -> Case:
    return Case("/v1/messages/count_tokens", {"model": MODEL, **more})


def batch(*names: str, **more: Any) -> Case:
    conversations = [example(name).messages for name in names]
    return Case("/v1/chat/completions/batch", {**GREEDY, "messages": conversations, "max_tokens": 100, **more})


PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ABOUT_WEATHER = {"name": "weather", "description": "The weather", "strict": True}
WEATHER = {"type": "function", "function": {**ABOUT_WEATHER, "parameters": PLACE}}
LOOSE_WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
FLAT_WEATHER = {"type": "function", **ABOUT_WEATHER, "parameters": PLACE}
ANTHROPIC_WEATHER = {**ABOUT_WEATHER, "input_schema": PLACE}
TOOLS = {"tools": [WEATHER, CLOCK], "max_tokens": 200}
TOOLS_OF_ONE = {**TOOLS, "tools": [WEATHER]}
LOOSE_TOOLS = {**TOOLS, "tools": [LOOSE_WEATHER]}
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
CALLED = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
]
ANTHROPIC_CALLED = [
    {"role": "user", "content": "How is it in Rome?"},
    {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome", "days": 1}}],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "dry"}]},
]
CALL_TEXT = r'<tool_call>\n\{"name": "weather", "arguments": \{"city": "Paris", "days": 1\}\}\n</tool_call>'
THOUGHT = "Here is my thought process: the sky scatters\\. Here is my response: blue(\\.|!)"


def shaped(**how: Any) -> dict[str, Any]:
    return {"structured_outputs": how, "max_tokens": 200}


BOTH_WAYS: dict[str, Case] = {
    "a chat": chat("python-game"),
    "a chat with a system prompt": chat("who-pirate"),
    "a second turn": chat("name-ada"),
    "a chat of many bytes a character": chat("emoji"),
    "a chat with line separators": chat("line-separators"),
    "a chat about a stream": chat("sse-text"),
    "a long chat": chat("long-story"),
    "a chat the model does not know": chat("ok", messages=user_turn("Qzx 4711 ~"), max_tokens=60),
    "a chat cut at a length": chat("count", max_tokens=7),
    "a chat of one token": chat("count", max_tokens=1),
    "max_completion_tokens": chat("count", max_tokens=None, max_completion_tokens=9),
    "n and seed": chat("ok", n=2, temperature=1.5, seed=7, max_tokens=12),
    "logprobs": chat("ok", logprobs=True),
    "top_logprobs": chat("emoji", logprobs=True, top_logprobs=4),
    "a stop string": chat("count", stop=", 9"),
    "stop strings, kept": chat("count", stop=["17", ", 12"], include_stop_str_in_output=True),
    "stop token ids": chat("count", stop_token_ids=[16]),
    "ignore_eos": chat("ok", ignore_eos=True, max_tokens=20),
    "min_tokens": chat("ok", min_tokens=15, max_tokens=30),
    "logit_bias": chat("hello", logit_bias={"50": 100, "60": 5}, max_tokens=8),
    "min_p": chat("hello", temperature=1.2, seed=3, min_p=0.2, max_tokens=30),
    "top_k": chat("hello", temperature=1.2, seed=4, top_k=3, max_tokens=30),
    "top_p": chat("hello", temperature=1.2, seed=5, top_p=0.6, max_tokens=30),
    "presence_penalty": chat("count", presence_penalty=1.5, max_tokens=60),
    "frequency_penalty": chat("count", frequency_penalty=1.5, max_tokens=60),
    "repetition_penalty": chat("count", repetition_penalty=1.4, max_tokens=60),
    "bad_words": chat("capital-france", bad_words=["Paris"], max_tokens=40),
    "allowed_token_ids": chat("ok", allowed_token_ids=[40, 50, 60], max_tokens=10),
    "special tokens, kept": chat("ok", skip_special_tokens=False, ignore_eos=True, max_tokens=8),
    "a prompt that is cut": chat("count", truncate_prompt_tokens=12, max_tokens=20),
    "arguments of the chat template": chat("ok", chat_template_kwargs={"add_generation_prompt": False}, max_tokens=20),
    "echo of a chat": chat("ok", echo=True),
    "a continued answer": chat(
        "count",
        messages=[*example("count").messages, {"role": "assistant", "content": "1, 2, 3,"}],
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    "content in parts": chat("ok", messages=[{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]),
    "return_token_ids": chat("ok", return_token_ids=True),
    "tokens as ids": chat("ok", logprobs=True, return_tokens_as_token_ids=True),
    "beams": chat("ok", use_beam_search=True, n=2, max_tokens=6),
    "a JSON object": chat("json", response_format={"type": "json_object"}),
    "a JSON schema": chat(
        "sky-json", response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    ),
    "structured JSON": chat("hello", **shaped(json=PLACE)),
    "structured regex": chat("hello", **shaped(regex=r"[a-f]{3}-\d{4}")),
    "structured choice": chat("hello", **shaped(choice=["north", "south"])),
    "structural tags": chat(
        "hello",
        max_tokens=200,
        response_format={
            "type": "structural_tag",
            "format": {
                "type": "tag",
                "begin": "<n>",
                "end": "</n>",
                "content": {"type": "regex", "pattern": "[12]{3}"},
            },
        },
    ),
    "structured grammar": chat("hello", **shaped(grammar='root ::= "x" digit+ "y"\ndigit ::= [0-3]{1,5}')),
    "reasoning": chat("sky", **shaped(regex=THOUGHT)),
    "reasoning, left out": chat("sky", include_reasoning=False, **shaped(regex=THOUGHT)),
    "tools, auto and not called": chat("ok", **TOOLS, tool_choice="auto"),
    "tools, auto and called": chat("ok", **LOOSE_TOOLS, structured_outputs={"regex": CALL_TEXT}),
    "tools, none": chat("ok", **TOOLS, tool_choice="none"),
    "tools, required": chat("ok", **TOOLS_OF_ONE, tool_choice="required"),
    "tools, named": chat("ok", **TOOLS, tool_choice=NAMED),
    "tools, one at a time": chat("ok", **TOOLS_OF_ONE, tool_choice="required", parallel_tool_calls=False),
    "tools, answered": chat("ok", messages=CALLED, **TOOLS),
    "a completion": completion("raw-fox"),
    "a completion in Chinese": completion("raw-moonlight"),
    "several prompts": completion("raw-fox", prompt=[example("raw-fox").prompt, example("raw-months").prompt]),
    "token ids": completion("raw-fox", prompt=[40, 50, 60], max_tokens=20),
    "several prompts of token ids": completion("raw-fox", prompt=[[40, 50], [60, 70, 80]], max_tokens=20),
    "echo": completion("raw-fox", echo=True),
    "echo with logprobs": completion("raw-fox", echo=True, logprobs=2),
    "echo only": completion("raw-fox", echo=True, logprobs=1, max_tokens=0),
    "n and seed of a completion": completion("raw-once", n=3, temperature=1.5, seed=11, max_tokens=12),
    "logprobs of a completion": completion("raw-moonlight", logprobs=3),
    "a stop string of a completion": completion("raw-months", stop=["July"]),
    "a penalised completion": completion("raw-months", frequency_penalty=1.0, presence_penalty=0.5, max_tokens=50),
    "a sampled completion": completion("raw-once", temperature=1.1, seed=5, top_k=10, min_p=0.05, max_tokens=30),
    "a structured completion": completion("raw-fox", **shaped(regex=r"[xyz]{4}")),
    "a completion's token ids": completion("raw-fox", return_token_ids=True),
    "a response": response("who"),
    "a response with instructions": response("who", input="Who are you?", instructions="You are a pirate."),
    "a response with logprobs": response("ok", include=["message.output_text.logprobs"], top_logprobs=2),
    "a response that reasons": response("sky", structured_outputs={"regex": THOUGHT}),
    "a response of a later turn": response("name-ada"),
    "a response cut at a length": response("count", max_output_tokens=9),
    "a response of a JSON schema": response(
        "hello", text={"format": {"type": "json_schema", "name": "place", "schema": PLACE}}
    ),
    "a response with a named tool": response(
        "ok", tools=[FLAT_WEATHER], tool_choice={"type": "function", "name": "weather"}, max_output_tokens=100
    ),
    "a response with a required tool": response(
        "ok", tools=[FLAT_WEATHER], tool_choice="required", max_output_tokens=100
    ),
    "a sampled response": response("hello", temperature=1.2, top_p=0.8, seed=5, max_output_tokens=30),
    "a message": message("who"),
    "a message under a system prompt": message("who-pirate"),
    "a message with a stop sequence": message("count", stop_sequences=[", 7"]),
    "a message of a later turn": message("name-ada"),
    "a message after a tool's result": message("ok", messages=ANTHROPIC_CALLED, tools=[ANTHROPIC_WEATHER]),
    "a sampled message": message("hello", temperature=0.1, top_k=1, max_tokens=30),
    "a message cut at a length": message("count", max_tokens=6),
    "a message with a forced tool": message(
        "ok",
        tools=[ANTHROPIC_WEATHER],
        tool_choice={"type": "tool", "name": "weather"},
    ),
    "a message with any tool": message("ok", tools=[ANTHROPIC_WEATHER], tool_choice={"type": "any"}),
}

STREAMED_ONLY: dict[str, Case] = {
    "a stream without usage": chat("count").streamed(),
    "a stream with usage in each event": chat("ok").streamed(
        stream_options={"include_usage": True, "continuous_usage_stats": True}
    ),
    "a completion's stream without usage": completion("raw-fox").streamed(),
}

OF_ONE_TOKEN: dict[str, Case] = {
    "a chat": chat("count", max_tokens=1).streamed(**USAGE),
    "a chat with logprobs": chat("count", max_tokens=1, logprobs=True, top_logprobs=2).streamed(),
    "a completion": completion("raw-fox", max_tokens=1).streamed(**USAGE),
    "a completion with echo": completion("raw-fox", max_tokens=1, echo=True).streamed(),
    "a response": response("count", max_output_tokens=1).streamed(),
    "a message": message("count", max_tokens=1).streamed(),
}

AT_ONCE_ONLY: dict[str, Case] = {
    "prompt_logprobs": chat("ok", prompt_logprobs=2),
    "prompt_logprobs of a completion": completion("raw-fox", prompt_logprobs=1),
    "beams of a completion": completion("raw-fox", use_beam_search=True, n=2, max_tokens=6, length_penalty=0.5),
    "batched chats": batch("ok", "hello", "sum"),
    "batched chats with logprobs": batch("ok", "sum", logprobs=True, top_logprobs=2),
    "the models": Case("/v1/models"),
    "the version": Case("/version"),
    "the health": Case("/health"),
    "the tokenizer": Case("/tokenizer_info"),
    "the tokens of a prompt": Case(
        "/tokenize", {"model": MODEL, "prompt": "The quick 月亮 🎉", "return_token_strs": True}
    ),
    "the tokens of a chat": Case(
        "/tokenize", {"model": MODEL, "messages": user_turn("Hello!"), "add_special_tokens": False}
    ),
    "the text of tokens": Case("/detokenize", {"model": MODEL, "tokens": [40, 50, 60, 300]}),
    "the tokens of a message": count(messages=user_turn("Hello!"), system="You are a pirate."),
    "the tokens of a message with tools": count(messages=user_turn("Hello!"), tools=[ANTHROPIC_WEATHER]),
    "scores of a generative model": Case(
        "/generative_scoring",
        {"model": MODEL, "query": "Is it a fox? ", "items": ["yes", "a dog"], "label_token_ids": [40, 50]},
    ),
}

REFUSED: dict[str, Case] = {
    "an unknown model": Case("/v1/chat/completions", {"model": "gpt-5", "messages": user_turn("Hello!")}),
    "too long a prompt": Case("/v1/completions", {**GREEDY, "prompt": "fox " * 5000}),
    "a wrong type": Case("/v1/chat/completions", {"messages": user_turn("Hello!"), "temperature": "hot"}),
    "a missing field": Case("/v1/chat/completions", {"model": MODEL}),
    "a value out of range": chat("ok", temperature=-1),
    "a suffix": completion("raw-fox", suffix="."),
    "n of 0": chat("ok", n=0),
    "too many logprobs": chat("ok", logprobs=True, top_logprobs=50),
    "a named tool without tools": chat("ok", tool_choice=NAMED),
    "usage of no stream": chat("ok", **USAGE),
    "a bad grammar": chat("ok", **shaped(grammar="root ::= (")),
    "a chat template of its own": chat(
        "ok", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}", max_tokens=20
    ),
    "prompt_logprobs of a stream": chat("ok", prompt_logprobs=2).streamed(),
    "a stream that is refused": chat("ok", temperature=-1).streamed(),
    "a tool that is not there": chat("ok", **TOOLS, tool_choice={"type": "function", "function": {"name": "none"}}),
    "a response of an unknown model": response("ok", model="gpt-5"),
    "a message of an unknown model": message("ok", model="gpt-5"),
    "a message without max_tokens": message("ok", max_tokens=None),
    "a count of an unknown model": count(model="gpt-5", messages=user_turn("Hello!")),
    "tokens of an unknown model": Case("/tokenize", {"model": "gpt-5", "prompt": "x"}),
    "detokenize without tokens": Case("/detokenize", {"model": MODEL}),
    "scores without labels": Case("/generative_scoring", {"model": MODEL, "query": "x", "items": ["y"]}),
}

# Answered by the router, not by a handler of vLLM's, and so without the error body that all others have.
BARE_REFUSALS: dict[str, Case] = {
    "a wrong method": Case("/v1/completions"),
    "another wrong method": Case("/v1/models", {"model": MODEL}),
    "embeddings of a generative model": Case("/v1/embeddings", {"model": MODEL, "input": "x"}),
    "a Cohere chat": Case("/cohere/v2/chat", {**GREEDY, "messages": user_turn("Hello!")}),
}


def embedding(given: Any, **more: Any) -> Case:
    return Case("/v1/embeddings", {"model": MODEL, "input": given, **more})


def pooling(given: Any, **more: Any) -> Case:
    return Case("/pooling", {"model": MODEL, "input": given, **more})


def score(query: Any, documents: Any, route: str = "/score", **more: Any) -> Case:
    return Case(route, {"model": MODEL, "queries": query, "documents": documents, **more})


def rerank(route: str = "/rerank", **more: Any) -> Case:
    body = {"model": MODEL, "query": "a fox", "documents": ["a dog", "a quick fox", "月亮"]}
    return Case(route, {**body, **more})


def classification(given: Any, **more: Any) -> Case:
    return Case("/classify", {"model": MODEL, "input": given, **more})


EMBEDDED: dict[str, Case] = {
    "an embedding": embedding("The quick brown fox"),
    "embeddings of a list": embedding(["a fox", "月亮 🎉"]),
    "an embedding of token ids": embedding([40, 50, 60]),
    "embeddings of lists of token ids": embedding([[40, 50], [60]]),
    "an embedding in base64": embedding("a fox", encoding_format="base64"),
    "an embedding of a chat": Case("/v1/embeddings", {"model": MODEL, "messages": user_turn("a fox")}),
    "an embedding that is cut": embedding("fox " * 100, truncate_prompt_tokens=9),
    "a pooling": pooling("a fox", task="embed"),
    "a pooling of a list": pooling(["a fox", "a dog"], task="embed"),
    "an embedding of Cohere's form": Case(
        "/v2/embed",
        {"model": MODEL, "texts": ["a fox"], "embedding_types": ["float", "base64"]},
    ),
    "a score": score("a fox", "a dog"),
    "scores": score("a fox", ["a dog", "a quick fox"]),
    "scores of OpenAI's prefix": score(["a fox", "a cat"], ["a dog", "a quick fox"], "/v1/score"),
    "a rerank": rerank(),
    "a rerank of the first": rerank(top_n=1),
    "a rerank under /v1": rerank("/v1/rerank"),
    "a rerank under /v2": rerank("/v2/rerank"),
    "tokens of an embedding model": Case("/tokenize", {"model": MODEL, "prompt": "a fox"}),
    "the models of an embedding model": Case("/v1/models"),
}

NOT_EMBEDDED: dict[str, Case] = {
    "an unknown model": embedding("x", model="gpt-5"),
    "no input": Case("/v1/embeddings", {"model": MODEL}),
    "too long an input": embedding("fox " * 5000),
    "dimensions that it has not": embedding("x", dimensions=7),
    "a pooling of an unknown task": pooling("x", task="dance"),
    "a score without documents": Case("/score", {"model": MODEL, "queries": "x"}),
    "a rerank without documents": Case("/rerank", {"model": MODEL, "query": "x"}),
    "a pooling of each token": pooling("a fox", task="token_embed"),
    "an embedding of Cohere's form for a task": Case(
        "/v2/embed", {"model": MODEL, "texts": ["a fox"], "input_type": "search_query"}
    ),
}

CLASSIFIED: dict[str, Case] = {
    "a class": classification("a fox"),
    "classes of a list": classification(["a fox", "月亮 🎉"]),
    "a class of token ids": classification([40, 50, 60]),
    "a class without activation": classification("a fox", use_activation=False),
    "a pooling of classes": pooling("a fox", task="classify"),
}

NOT_CLASSIFIED: dict[str, Case] = {
    "a class for an unknown model": classification("x", model="gpt-5"),
    "no input for a class": Case("/classify", {"model": MODEL}),
}

NOT_COMPARED: dict[str, str] = {
    "/cold_start": "the worker's own, which vLLM has not; tested with the start",
    "/cohere/v2/chat": "needs the package `cohere` and VLLM_ENABLE_COHERE_API; without them vLLM has no such route",
    "/v1/audio/transcriptions": "takes a form and needs a model for it; tests/integration/test_audio.py compares it",
    "/v1/audio/translations": "takes a form and needs a model for it; tests/integration/test_audio.py compares it",
}

# The same over HTTP, where a worker answers as vLLM's own server does: both ways, and refused.
OVER_HTTP = {f"{name}, at once": case for name, case in BOTH_WAYS.items()}
OVER_HTTP |= {
    f"{name}, streamed": case.streamed(**(USAGE if case.route.endswith("/completions") else {}))
    for name, case in BOTH_WAYS.items()
}
OVER_HTTP |= {f"{name}, refused": case for name, case in REFUSED.items()}
