"""Payloads of worker-vllm and of RunPod's package for LangChain get responses that their users can parse.

Sources: README and tests of worker-vllm (commit 7a92503, and versions before 2), requests of `langchain-runpod` 0.2.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.emulator.conftest import Site

CHAT = [{"role": "user", "content": "Who are you?"}]
SHORT = {"max_tokens": 8}
LEGACY: dict[str, dict[str, Any]] = {
    "a prompt": {"prompt": "why sky is blue?", "sampling_params": {"temperature": 0.7, "max_tokens": 10}},
    "a prompt and nothing else": {"prompt": "Write a short poem.", "sampling_params": SHORT},
    "messages": {"messages": CHAT, "sampling_params": SHORT},
    "a system message": {"messages": [{"role": "system", "content": "Be brief."}, *CHAT], "sampling_params": SHORT},
    "messages before a prompt": {"messages": CHAT, "prompt": "x", "sampling_params": SHORT},
    "an empty prompt": {"messages": CHAT, "prompt": "", "sampling_params": SHORT},
    "no stream": {"prompt": "x", "sampling_params": SHORT, "stream": False},
    "null": {"messages": CHAT, "prompt": None, "stream": None, "sampling_params": SHORT, "apply_chat_template": None},
    "the template asked for": {"prompt": "x", "apply_chat_template": True, "sampling_params": SHORT},
    "batches": {"prompt": "x", "max_batch_size": 1, "min_batch_size": 1, "batch_size_growth_factor": 3, **SHORT},
    "all sampling parameters": {
        "prompt": "x",
        "sampling_params": {
            "n": 1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "temperature": 0.5,
            "top_p": 0.9, "top_k": 40, "min_p": 0.0, "stop": ["."], "stop_token_ids": [], "ignore_eos": False,
            "max_tokens": 8, "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True,
            "use_beam_search": False, "length_penalty": 1.0, "seed": 1, "logprobs": None, "bad_words": [],
            "include_stop_str_in_output": False, "truncate_prompt_tokens": None, "prompt_logprobs": None,
        },
    },
    "a model": {"messages": CHAT, "model": "tiny", "sampling_params": SHORT},
    "LangChain, a chat": {"prompt": "User: Hello!", "temperature": 0.7, "max_tokens": 8, "top_p": 0.9, "top_k": 50},
    "LangChain, a stop": {"prompt": "User: Hello!", "max_tokens": 8, "stop": ["User:"]},
    "LangChain, nothing set": {"prompt": "Hello!", **SHORT},
    "one of several words": {"messages": CHAT, "sampling_params": {"guided_choice": ["yes"]}},
    "a pattern": {"prompt": "x", "sampling_params": {"guided_regex": "yes"}},
    "a grammar": {"prompt": "x", "sampling_params": {"guided_grammar": 'root ::= "yes"'}},
    "a schema": {"messages": CHAT, "sampling_params": {"guided_json": {"type": "string", "enum": ["yes"]}}},
    "one of several words, in extra_body": {"messages": CHAT, "extra_body": {"guided_choice": ["yes"]}},
}  # fmt: skip
OPENAI: dict[str, dict[str, Any]] = {
    "a chat": {"openai_route": "/v1/chat/completions", "openai_input": {"messages": CHAT, **SHORT, "temperature": 0.1}},
    "a chat without a route": {"openai_input": {"messages": CHAT, **SHORT}},
    "a completion": {"openai_route": "/v1/completions", "openai_input": {"prompt": "x", "max_tokens": 5}},
    "a response": {
        "openai_route": "/v1/responses",
        "openai_input": {"input": "Tell me a joke.", "max_output_tokens": 8},
    },
    "a message": {"openai_route": "/v1/messages", "openai_input": {"model": "tiny", "messages": CHAT, **SHORT}},
    "models": {"openai_route": "/v1/models"},
    "models, with an empty body": {"openai_route": "/v1/models", "openai_input": {}},
    "a route": {"route": "/v1/chat/completions", "method": "POST", "body": {"messages": CHAT, **SHORT}},
    "a route, any case": {"route": "/v1/chat/completions", "method": "Post", "body": {"messages": CHAT, **SHORT}},
    "a route to read": {"route": "/v1/models"},
    "a slash at the end": {"route": "/v1/models/"},
    "a tokenization": {"route": "/tokenize", "body": {"prompt": "x"}},
}
REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "nothing": ({}, 400),
    "a misspelt parameter": ({"prompt": "x", "max_token": 5}, 400),
    "a route that vLLM does not have": ({"openai_route": "/v1/models/tiny"}, 404),
    "a route twice": ({"openai_route": "/v1/v1/chat/completions", "openai_input": {"messages": CHAT}}, 404),
    "a closed route": ({"route": "/invocations", "body": {"messages": CHAT}}, 403),
    "another model": ({"messages": CHAT, "model": "gpt-5"}, 404),
    "a grammar that is none": ({"prompt": "x", "sampling_params": {"guided_grammar": "root ::= ("}}, 400),
    "old and new words": ({"prompt": "x", "guided_regex": "a", "structured_outputs": {"regex": "b"}}, 400),
}


def output_of(llm: Site, value: dict[str, Any]) -> Any:
    """Run a job; return the output from `/status`."""
    status = llm.ended(llm.submit(value), 60)
    assert status["status"] == "COMPLETED", status
    return status["output"]


@pytest.mark.parametrize("name", LEGACY)
def test_a_top_level_job_returns_vllms_format_with_langchains_fields(name: str, llm: Site) -> None:
    (answer,) = output_of(llm, LEGACY[name])

    choice = answer["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    assert "".join(choice["tokens"]) == text
    assert text.strip('"') == "yes" or not any("guided" in json.dumps(part) for part in LEGACY[name].values())
    assert (answer["usage"]["input"], answer["usage"]["output"]) == (
        answer["usage"]["prompt_tokens"],
        answer["usage"]["completion_tokens"],
    )


@pytest.mark.parametrize("name", LEGACY)
def test_a_top_level_job_streams(name: str, llm: Site) -> None:
    parts = output_of(llm, {**LEGACY[name], "stream": True})

    assert parts[-1]["finish_reason"]
    assert parts[-1]["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize("name", OPENAI)
def test_a_job_with_a_route_returns_vllms_response(name: str, llm: Site) -> None:
    (answer,) = output_of(llm, OPENAI[name])

    assert answer.keys() & {"choices", "data", "output", "content", "tokens"}


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_job_fails_with_a_status_and_is_not_retryable(name: str, llm: Site) -> None:
    value, status = REFUSED[name]

    job = llm.ended(llm.submit(value), 60)

    assert job["status"] == "FAILED"
    error = json.loads(job["error"])
    assert (error["status"], error["retryable"]) == (status, False)
    assert error["error"]["message"]
