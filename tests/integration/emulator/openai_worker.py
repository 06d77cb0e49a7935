"""A worker with the stock SDK and a scripted handler that returns OpenAI API responses; no model, no vLLM.

Requests for models other than `tiny` fail with 404. In a chat, the last message is a script:
    `COUNT x N`     N events, `PAUSE_S` seconds apart
    `sleep S`       respond after S seconds
    `raise`         an exception
    `raise later`   an exception after the first event
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import runpod

PAUSE_S = float(os.environ.get("PAUSE_S", "0"))


def failure(status: int, message: str, kind: str) -> dict[str, str]:
    error = {"message": message, "type": kind, "param": None, "code": status}
    return {"error": json.dumps({"error": error, "status": status, "retryable": False})}


def chunk(content: str) -> str:
    document = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "tiny",
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": content}, "finish_reason": None}],
    }
    return f"data: {json.dumps(document)}\n\n"


def chat(content: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def completion(text: str) -> dict[str, Any]:
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "tiny",
        "choices": [{"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}],
    }


async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
    job_input = job["input"]
    route = job_input.get("openai_route")
    if route is None:
        async for output in plain(job_input):
            yield output
        return
    request = job_input.get("openai_input")
    if route == "/v1/models":
        yield {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 1, "owned_by": "tests"}]}
    elif request.get("model", "tiny") != "tiny":
        yield failure(404, f"The model `{request['model']}` does not exist.", "NotFoundError")
    elif request.get("max_tokens", 1) < 1:
        yield failure(400, "max_tokens must be at least 1", "BadRequestError")
    elif route == "/v1/completions":
        yield completion(f"{request['prompt']}!")
    else:
        async for output in converse(request):
            yield output


async def plain(job_input: dict[str, Any]) -> AsyncIterator[Any]:
    for number in range(job_input.get("count", 1)):
        await asyncio.sleep(job_input.get("sleep", 0))
        # Makes an output large.
        padding = {"padding": "x" * job_input["padding"]} if "padding" in job_input else {}
        yield {"number": number, **padding}


async def converse(request: dict[str, Any]) -> AsyncIterator[Any]:
    text = request["messages"][-1]["content"]
    words = text.split()
    if words[0] == "sleep":
        await asyncio.sleep(float(words[1]))
    if text == "raise":
        raise RuntimeError("the handler broke")
    if not request.get("stream"):
        yield chat(f"echo: {text}")
        return
    count = int(words[2]) if words[0] == "COUNT" else 1
    for number in range(count):
        yield chunk(f"{number} ")
        await asyncio.sleep(PAUSE_S)
        if text == "raise later":
            raise RuntimeError("the handler broke later")
    yield "data: [DONE]\n\n"


if __name__ == "__main__":
    concurrency = int(os.environ.get("CONCURRENCY", "1"))
    runpod.serverless.start(
        {
            "handler": handler,
            "concurrency_modifier": lambda _: concurrency,
            "return_aggregate_stream": True,
            "refresh_worker": "REFRESH" in os.environ,
        }
    )
