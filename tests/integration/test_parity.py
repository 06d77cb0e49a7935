"""What comes out of the queue is what vLLM's own server answers, but for ids and times."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest

from builder.tiny_corpus import example
from tests.job_queue import JobQueue

pytestmark = pytest.mark.usefixtures("worker")

GREEDY = {"model": "tiny", "temperature": 0}
USAGE = {"stream_options": {"include_usage": True}}


def chat(name: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {**GREEDY, "messages": example(name).messages, "max_tokens": 900, **more}


def completion(name: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {**GREEDY, "prompt": example(name).prompt, "max_tokens": 200, **more}


CASES = {
    "a chat": chat("python-game"),
    "a chat with a system prompt": chat("who-pirate"),
    "a second turn": chat("name-ada"),
    "a chat of many bytes a character": chat("emoji"),
    "a chat with two choices and logprobs": chat("ok", n=2, temperature=0.5, seed=7, logprobs=True),
    "a long chat": chat("long-story"),
    "a completion": completion("raw-fox"),
    "a completion in Chinese": completion("raw-moonlight"),
    "two prompts": completion("raw-fox", prompt=[example("raw-fox").prompt, example("raw-months").prompt]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_what_vllm_answers(name: str, job_queue: JobQueue, vllm_alone: httpx.Client) -> None:
    route, body = CASES[name]

    job = job_queue.run({"openai_route": route, "openai_input": body})

    (output,) = job.wait()
    assert timeless(output) == timeless(vllm_alone.post(route, json=body).json())


@pytest.mark.parametrize("name", CASES)
def test_a_stream_is_what_vllm_streams(name: str, job_queue: JobQueue, vllm_alone: httpx.Client) -> None:
    route, body = CASES[name]
    body = {**body, "stream": True, **USAGE}

    batches = job_queue.run({"openai_route": route, "openai_input": body}).wait()

    assert all(batch.endswith("\n\n") for batch in batches)
    assert "".join(batches).endswith("data: [DONE]\n\n")
    expected = merged(events(vllm_alone.post(route, json=body).text))
    assert merged(events("".join(batches))) == expected


@pytest.mark.parametrize("route", ["/v1/models", "/version"])
def test_a_get_is_what_vllm_answers(route: str, job_queue: JobQueue, vllm_alone: httpx.Client) -> None:
    job = job_queue.run({"openai_route": route})

    (output,) = job.wait()
    assert timeless(output) == timeless(vllm_alone.get(route).json())


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "an unknown model": chat("ok", model="gpt-5"),
    "too long a prompt": completion("raw-fox", prompt="fox " * 5000),
    "a wrong type": chat("ok", temperature="hot"),
    "a missing field": ("/v1/chat/completions", {"model": "tiny"}),
    "a value out of range": chat("ok", temperature=-1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_vllms_own(name: str, job_queue: JobQueue, vllm_alone: httpx.Client) -> None:
    route, body = REFUSED[name]

    error = job_queue.run({"openai_route": route, "openai_input": body}).error()

    direct = vllm_alone.post(route, json=body)
    assert error == {**direct.json(), "status": direct.status_code, "retryable": False}
    assert error["error"]["message"]


def test_the_first_batch_comes_before_the_answer_has_ended(job_queue: JobQueue) -> None:
    route, body = chat("long-story", stream=True)

    job = job_queue.submit({"openai_route": route, "openai_input": body})
    first = job.first_output()

    assert job.status()["status"] == "IN_PROGRESS"
    assert len(first) < len("".join(job.wait()))


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, parsed by the book: one `data:` line each, a blank line after it."""
    blocks = text.removesuffix("\n\n").split("\n\n")
    if blocks[-1] != "data: [DONE]":
        raise ValueError(f"the stream does not end as it has to: {blocks[-1]!r}")
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def merged(stream: Iterable[dict[str, Any]]) -> dict[Any, Any]:
    """What a stream says, however its text was divided among events: vLLM joins events when it is behind."""
    said: dict[Any, Any] = {"usage": None}
    for event in stream:
        said["usage"] = event.get("usage") or said["usage"]
        said["model"], said["object"] = event["model"], event["object"]
        for choice in event["choices"]:
            part = said.setdefault(choice["index"], {"text": "", "role": None, "finish_reason": None, "logprobs": []})
            delta = choice.get("delta", choice)
            part["text"] += delta.get("content") or delta.get("text") or ""
            part["role"] = delta.get("role") or part["role"]
            part["finish_reason"] = choice["finish_reason"] or part["finish_reason"]
            part["logprobs"] += (choice.get("logprobs") or {}).get("content") or []
    return said


def timeless(value: Any) -> Any:
    """The value without what differs from one answer to the next: ids, times, the configuration's fingerprint."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in UNLIKE or not _made(name, part)}
    return [timeless(part) for part in value] if isinstance(value, list) else value


UNLIKE = {"id", "created", "system_fingerprint"}


def _made(name: str, value: Any) -> bool:
    return name != "id" or str(value).startswith(("chatcmpl-", "cmpl-", "modelperm-"))
