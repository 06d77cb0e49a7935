"""One worker with the real SDK and the real engine: memorized answers, cancelled jobs, invalid jobs."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from builder.tiny_model.corpus import CORPUS, example
from tests.emulator_queue import EmulatorQueue
from tests.processes import Process

pytestmark = pytest.mark.usefixtures("worker")

GREEDY = {"temperature": 0}
# Half a minute of work, so that a stop arrives before its end on a busy machine too.
CHOICES, MAX_TOKENS = 24, 1900
ENDLESS = {"n": CHOICES, "temperature": 1, "max_tokens": MAX_TOKENS, "ignore_eos": True}
GOOD = {"messages": example("ok").messages, "sampling_params": GREEDY}


def metric(job_queue: EmulatorQueue, name: str, label: str = "") -> float:
    """Read one of vLLM's metrics from the engine's `/metrics`."""
    (text,) = job_queue.run({"openai_route": "/metrics"}).wait()
    found = re.search(rf"^vllm:{name}{{.*{label}.*}} (\S+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"vLLM has no metric {name}")
    return float(found[1])


@pytest.mark.parametrize("known", CORPUS, ids=lambda known: known.name)
def test_a_top_level_job_streams_the_memorized_answer(known: Any, job_queue: EmulatorQueue) -> None:
    job_input = {"prompt": known.prompt} if known.prompt is not None else {"messages": known.messages}

    outputs = job_queue.run({**job_input, "sampling_params": GREEDY, "stream": True}).wait()

    assert "".join(output["text"] for output in outputs) == known.answer
    assert [output["finish_reason"] for output in outputs if output["finish_reason"]] == ["stop"]
    assert outputs[-1]["usage"]["completion_tokens"] > 0


def test_each_of_many_concurrent_jobs_gets_its_own_answer(job_queue: EmulatorQueue) -> None:
    chats = [known for known in CORPUS if known.prompt is None]
    jobs = [
        job_queue.submit({"messages": known.messages, "sampling_params": GREEDY, "stream": True}) for known in chats
    ]

    answers = ["".join(output["text"] for output in job.wait()) for job in jobs]

    assert answers == [known.answer for known in chats]


def test_a_top_level_prompt_without_max_tokens_is_completed_to_its_end(job_queue: EmulatorQueue) -> None:
    known = example("raw-months")

    (output,) = job_queue.run({"prompt": known.prompt, "sampling_params": GREEDY}).wait()

    assert output["choices"][0]["text"] == known.answer
    assert output["usage"]["completion_tokens"] > 16


@pytest.mark.parametrize(
    "job_input",
    [
        {
            "messages": example("ok").messages,
            "sampling_params": {"temperature": 0, "logprobs": True, "top_logprobs": 2},
        },
        {
            "prompt": example("raw-months").prompt,
            "sampling_params": {"temperature": 0, "logprobs": 2, "max_tokens": 20},
        },
    ],
    ids=["chat", "completion"],
)
def test_logprobs_of_top_level_jobs_are_in_openais_format_streamed_or_not(
    job_input: dict[str, Any], job_queue: EmulatorQueue
) -> None:
    (answer,) = job_queue.run(job_input).wait()
    deltas = job_queue.run({**job_input, "stream": True, "batch_size": 5}).wait()

    logprobs = answer["choices"][0]["logprobs"]
    for name, items in logprobs.items():
        streamed = [item for delta in deltas for item in delta.get("logprobs", {}).get(name) or []]
        assert len(streamed) == len(items or [])
    tokens = logprobs.get("tokens") or [token["token"] for token in logprobs["content"]]
    assert "".join(tokens).startswith("".join(delta["text"] for delta in deltas))
    assert len(tokens) == deltas[-1]["usage"]["completion_tokens"]
    assert deltas[0]["warnings"] == ["batch_size: ignored, as BATCH_INTERVAL_MS of the worker sets the size of batches"]


def test_a_job_without_a_model_name_is_answered_by_the_served_model(job_queue: EmulatorQueue) -> None:
    (output,) = job_queue.run({"openai_route": "/v1/chat/completions", "openai_input": GOOD["messages"] and {
        "messages": GOOD["messages"], **GREEDY}}).wait()  # fmt: skip

    assert (output["model"], output["choices"][0]["message"]["content"]) == ("tiny", "OK")


def test_the_models_directory_is_accepted_as_its_name(job_queue: EmulatorQueue, tiny_model: str) -> None:
    (answer,) = job_queue.run({**GOOD, "model": tiny_model}).wait()

    assert answer["model"] == "tiny"


def test_the_list_of_models_and_the_error_for_another_name_show_no_directory(job_queue: EmulatorQueue) -> None:
    (models,) = job_queue.run({"openai_route": "/v1/models"}).wait()
    error = job_queue.run({**GOOD, "model": "gpt-5"}).error()

    assert [model["id"] for model in models["data"]] == ["tiny"]
    assert error["error"]["message"] == "The model `gpt-5` does not exist. Valid aliases: tiny."


def test_the_status_of_a_streamed_job_has_the_complete_answer(job_queue: EmulatorQueue) -> None:
    job = job_queue.run({**GOOD, "stream": True})

    assert job.status()["output"] == job.wait()


def test_jobs_that_are_cancelled_one_by_one_under_load_are_all_aborted(job_queue: EmulatorQueue) -> None:
    """Each is cancelled at another point; one that was not aborted would run to its maximum length."""

    def completed() -> float:
        return metric(job_queue, "request_success_total", 'finished_reason="length"')

    before = completed()
    for _ in range(3):
        job_input = {"prompt": "January,", "sampling_params": {**ENDLESS, "n": 1}, "stream": True}
        jobs = [job_queue.submit(job_input) for _ in range(CHOICES)]
        for job in jobs:
            job.first_output()
        for job in jobs:
            job_queue.cancel(job)
            time.sleep(0.02)

        eventually(lambda: metric(job_queue, "num_requests_running") == 0)
    assert completed() == before


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_job_is_aborted_in_the_engine(stream: bool, job_queue: EmulatorQueue) -> None:
    tokens = metric(job_queue, "generation_tokens_total")
    job = job_queue.submit({"prompt": "January,", "sampling_params": ENDLESS, "stream": stream})
    eventually(lambda: metric(job_queue, "num_requests_running") == CHOICES)

    job_queue.cancel(job)

    eventually(lambda: metric(job_queue, "num_requests_running") == 0)
    assert metric(job_queue, "generation_tokens_total") - tokens < CHOICES * MAX_TOKENS
    assert job.status()["status"] == "CANCELLED"


INVALID_INPUTS: dict[str, Any] = {
    "nothing": {},
    "a text": "hello",
    "a list": [],
    "a number": 5,
    "an unknown form": {"text": "hello"},
    "a misspelt field": {"message": [{"role": "user", "content": "hi"}]},
    "an unknown route": {"openai_route": "/v1/chat/complete", "openai_input": {"messages": []}},
    "a route with a host": {"openai_route": "@127.0.0.1:9/v1/models"},
    "a route that is a URL": {"openai_route": "http://127.0.0.1:9/v1/models"},
    "a route that climbs": {"openai_route": "/v1/../metrics"},
    "a route that is a number": {"openai_route": 5, "openai_input": {}},
    "a wrong method": {"openai_route": "/v1/models", "openai_input": {"a": 1}},
    "a GET of what is posted": {"openai_route": "/v1/chat/completions"},
    "an input that is a text": {"openai_route": "/v1/completions", "openai_input": "{}"},
    "an empty input": {"openai_route": "/v1/chat/completions", "openai_input": {}},
    "no messages": {"messages": []},
    "messages that are a text": {"messages": "hi"},
    "a message that is a text": {"messages": ["hi"]},
    "a message without a role": {"messages": [{"content": "hi"}]},
    "a prompt that is a number": {"prompt": 5},
    "an empty prompt": {"prompt": ""},
    "a prompt of 2 MB": {"prompt": "fox " * 500_000},
    "token ids that do not exist": {"prompt": [10**9]},
    "token ids below zero": {"prompt": [-1]},
    "half a surrogate pair": {"prompt": "\ud83d"},
    "negative max_tokens": {"prompt": "x", "sampling_params": {"max_tokens": -1}},
    "no max_tokens at all": {"prompt": "x", "sampling_params": {"max_tokens": 0}},
    "max_tokens beyond the model": {"prompt": "x", "sampling_params": {"max_tokens": 10**9}},
    "max_tokens in words": {"prompt": "x", "sampling_params": {"max_tokens": "many"}},
    "a temperature below zero": {"prompt": "x", "sampling_params": {"temperature": -1}},
    "a temperature of nothing known": {"prompt": "x", "sampling_params": {"temperature": "NaN"}},
    "top_p above one": {"prompt": "x", "sampling_params": {"top_p": 2}},
    "an unknown model": {"prompt": "x", "model": "gpt-5"},
    "no choices": {"prompt": "x", "sampling_params": {"n": 0}},
    "a stream that is perhaps": {"prompt": "x", "stream": "perhaps"},
    "parameters that are a list": {"prompt": "x", "sampling_params": []},
    "a schema that is none": {"prompt": "x", "sampling_params": {"structured_outputs": {"json": "{"}}},
    "an unknown tool choice": {"messages": [{"role": "user", "content": "x"}], "sampling_params": {"tool_choice": "a"}},
    "two forms at once": {"prompt": "x", "openai_route": "/v1/models"},
}


@pytest.mark.parametrize("name", INVALID_INPUTS)
def test_an_invalid_input_gets_a_parseable_error_and_the_next_job_its_answer(
    name: str, job_queue: EmulatorQueue
) -> None:
    error = job_queue.run(INVALID_INPUTS[name]).error()

    assert 400 <= error["status"] < 500
    assert error["error"]["message"]
    assert error["error"]["type"]
    assert error["retryable"] is False
    (answer,) = job_queue.run(GOOD).wait()
    assert answer["choices"][0]["message"]["content"] == "OK"


def test_requests_and_secrets_are_not_exposed(worker: Process, job_queue: EmulatorQueue) -> None:
    """Neither in the log or on a command line, nor, for secrets, in the answers of jobs."""
    words = [{"role": "user", "content": "the-clients-own-words"}]
    jobs = [job_queue.run({"messages": words, "stream": stream}) for stream in (True, False)]
    jobs += [job_queue.run(INVALID_INPUTS[name]) for name in INVALID_INPUTS]

    public = [worker.log, *(" ".join(process.cmdline()) for process in worker.family())]
    answers = [json.dumps(job.status()) for job in jobs]

    assert len(public) >= 3
    assert not [text for text in public if "the-clients-own-words" in text]
    assert not [text for text in [*public, *answers] if "notareal" in text]


def eventually(condition: Any, timeout_s: float = 20.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s")
