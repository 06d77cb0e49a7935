"""The emulator with this repository's worker and real vLLM, scaled up from zero."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai.types.chat import ChatCompletionMessageParam

from builder.tiny_model.corpus import CORPUS, Example, example
from tests.integration.emulator.conftest import KEY, REPOSITORY, CommandLine, eventually

pytestmark = pytest.mark.usefixtures("tiny_model")
START_S = 300.0


def messages_of(known: Example) -> list[ChatCompletionMessageParam]:
    messages: list[ChatCompletionMessageParam] = known.messages  # type: ignore[assignment]
    return messages


def counts_of(state: dict[str, Any]) -> list[int]:
    """Return the number of workers, once a second."""
    return [point["workers"] + point["initializing"] for point in state["history"]]


async def chats(url: str, count: int) -> list[tuple[str | None, str]]:
    """Send this many concurrent chats; return pairs of the response and the memorized answer."""
    known = [it for it in CORPUS if it.prompt is None]
    chosen = [known[number % len(known)] for number in range(count)]
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=START_S) as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(model="tiny", messages=messages_of(it), temperature=0) for it in chosen)
        )
    return [(answer.choices[0].message.content, it.answer) for answer, it in zip(answers, chosen, strict=True)]


def test_forty_concurrent_chats_are_answered_while_workers_scale_up_and_down(
    command_line: Callable[..., CommandLine],
) -> None:
    # What `make up` starts, but with one job at a time, so that there is work for two workers.
    emulator = command_line("--quiet", "--idle-timeout", "5", "--env", "MAX_CONCURRENCY=1")
    site = emulator.site
    assert site.state()["workers"] == []

    answers = asyncio.run(chats(site.openai_url, 40))

    assert all(response == memorized for response, memorized in answers)
    eventually(lambda: site.state()["workers"] == [], 60)
    # The history is sampled once a second.
    eventually(lambda: counts_of(site.state())[-1] == 0)
    state = site.state()
    counts = counts_of(state)
    for event in state["events"]:
        sys.stdout.write(f"{event['at'] - state['events'][0]['at']:6.2f} s  {event['text']}\n")
    sys.stdout.write(f"workers, once a second: {counts}\n")
    assert (counts[0], max(counts), counts[-1]) == (0, 2, 0)
    assert all((worker["reason"], worker["exitCode"]) == ("idle for 5 s", 0) for worker in state["gone"])
    assert {job["status"] for job in state["jobs"]} == {"COMPLETED"}


def test_jobs_of_a_dead_engine_are_retryable_and_the_next_worker_completes_them(
    command_line: Callable[..., CommandLine],
) -> None:
    site = command_line("--quiet", "--workers-max=1", "--workers-min=1").site
    job_input = {"prompt": "January,", "sampling_params": {"max_tokens": 1500, "ignore_eos": True}, "stream": True}
    job_ids = [site.submit(job_input) for _ in range(20)]
    eventually(lambda: all(job["firstOutputAt"] for job in site.state()["jobs"]), START_S)
    (worker,) = site.state()["workers"]

    (core,) = [it for it in psutil.Process(worker["pid"]).children(recursive=True) if "EngineCore" in it.name()]
    core.send_signal(signal.SIGKILL)

    failed = [site.ended(job_id) for job_id in job_ids]
    assert [(job["status"], json.loads(job["error"])["retryable"]) for job in failed] == [("FAILED", True)] * 20
    for job_id in job_ids:
        site.client.post(f"/retry/{job_id}").raise_for_status()
    retried = [site.ended(job_id, START_S) for job_id in job_ids]
    assert {job["status"] for job in retried} == {"COMPLETED"}
    assert {job["output"][-1]["usage"]["completion_tokens"] for job in retried} == {1500}
    assert {job["workerId"] for job in retried}.isdisjoint({worker["id"]})


def test_serve_api_serves_the_openai_client_with_one_worker() -> None:
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                [
                    sys.executable,
                    "handler.py",
                    "--rp_serve_api",
                    "--rp_api_host=127.0.0.1",
                    "--rp_api_port=0",
                    "--quiet",
                ],
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(process.terminate)
        assert process.stdout is not None
        url = next(found[1] for line in process.stdout if (found := re.search(r"listens on (\S+)", line)))
        client = openai.OpenAI(base_url=f"{url}/v2/local/openai/v1", api_key="local", max_retries=0, timeout=START_S)

        story = example("long-story")
        stream = client.chat.completions.create(
            model="tiny", messages=messages_of(story), temperature=0, stream=True, extra_body={"min_tokens": 1}
        )
        chunks = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(chunks) == story.answer
        assert len(chunks) > 100
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError, match="Valid aliases: tiny"):
            client.chat.completions.create(model="gpt-5", messages=messages_of(story))
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="tiny", messages=messages_of(story), temperature=-1)
        with client.chat.completions.create(
            model="tiny", messages=messages_of(story), stream=True, extra_body={"ignore_eos": True}
        ) as hung_up:
            next(hung_up)
        with openai.OpenAI(base_url=f"{url}/v2/local", api_key="local") as raw:
            eventually(lambda: raw.get("/health", cast_to=dict)["jobs"]["inProgress"] == 0)
        (endpoint,) = httpx.get(f"{url}/state", headers={"Authorization": "Bearer local"}).json()["endpoints"]
        assert endpoint["jobs"][0]["status"] == "CANCELLED"
