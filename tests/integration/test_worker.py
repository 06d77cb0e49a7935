"""One worker, the real SDK and the real engine: answers by heart, jobs that are dropped, jobs that are wrong."""

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
# Half a minute of work, so that a stop comes well before its end on a busy machine too.
CHOICES, MAX_TOKENS = 24, 1900
ENDLESS = {"n": CHOICES, "temperature": 1, "max_tokens": MAX_TOKENS, "ignore_eos": True}
GOOD = {"messages": example("ok").messages, "sampling_params": GREEDY}


def metric(job_queue: EmulatorQueue, name: str, label: str = "") -> float:
    """One of vLLM's own figures, from the engine's `/metrics`."""
    (text,) = job_queue.run({"openai_route": "/metrics"}).wait()
    found = re.search(rf"^vllm:{name}{{.*{label}.*}} (\S+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"vLLM has no metric {name}")
    return float(found[1])


@pytest.mark.parametrize("known", CORPUS, ids=lambda known: known.name)
def test_a_top_level_job_streams_the_answer_that_the_model_knows(known: Any, job_queue: EmulatorQueue) -> None:
    asked = {"prompt": known.prompt} if known.prompt is not None else {"messages": known.messages}

    outputs = job_queue.run({**asked, "sampling_params": GREEDY, "stream": True}).wait()

    assert "".join(output["text"] for output in outputs) == known.answer
    assert [output["finish_reason"] for output in outputs if output["finish_reason"]] == ["stop"]
    assert outputs[-1]["usage"]["completion_tokens"] > 0


def test_many_jobs_at_once_get_each_their_own_answer(job_queue: EmulatorQueue) -> None:
    chats = [known for known in CORPUS if known.prompt is None]
    jobs = [
        job_queue.submit({"messages": known.messages, "sampling_params": GREEDY, "stream": True}) for known in chats
    ]

    said = ["".join(output["text"] for output in job.wait()) for job in jobs]

    assert said == [known.answer for known in chats]


def test_an_unstreamed_top_level_prompt_runs_to_its_end(job_queue: EmulatorQueue) -> None:
    known = example("raw-months")

    (output,) = job_queue.run({"prompt": known.prompt, "sampling_params": GREEDY}).wait()

    assert output["choices"][0]["text"] == known.answer
    assert output["usage"]["completion_tokens"] > 16


@pytest.mark.parametrize(
    "asked",
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
def test_the_native_forms_logprobs_are_openais_streamed_or_not(asked: dict[str, Any], job_queue: EmulatorQueue) -> None:
    (whole,) = job_queue.run(asked).wait()
    deltas = job_queue.run({**asked, "stream": True, "batch_size": 5}).wait()

    of_all = whole["choices"][0]["logprobs"]
    for name, items in of_all.items():
        streamed = [item for delta in deltas for item in delta.get("logprobs", {}).get(name) or []]
        assert len(streamed) == len(items or [])
    tokens = of_all.get("tokens") or [token["token"] for token in of_all["content"]]
    assert "".join(tokens).startswith("".join(delta["text"] for delta in deltas))
    assert len(tokens) == deltas[-1]["usage"]["completion_tokens"]
    assert deltas[-1]["warnings"] == ["batch_size: ignored, as the worker sets the size of batches"]


def test_a_job_without_a_model_name_is_answered_by_the_model_that_is_served(job_queue: EmulatorQueue) -> None:
    (output,) = job_queue.run({"openai_route": "/v1/chat/completions", "openai_input": GOOD["messages"] and {
        "messages": GOOD["messages"], **GREEDY}}).wait()  # fmt: skip

    assert (output["model"], output["choices"][0]["message"]["content"]) == ("tiny", "OK")


def test_the_model_answers_to_its_directory_too_and_says_its_first_name(
    job_queue: EmulatorQueue, tiny_model: str
) -> None:
    (answer,) = job_queue.run({**GOOD, "model": tiny_model}).wait()

    assert answer["model"] == "tiny"


def test_the_models_and_the_error_for_another_name_show_names_and_no_directory(job_queue: EmulatorQueue) -> None:
    (models,) = job_queue.run({"openai_route": "/v1/models"}).wait()
    error = job_queue.run({**GOOD, "model": "gpt-5"}).error()

    assert [model["id"] for model in models["data"]] == ["tiny"]
    assert error["error"]["message"] == "The model `gpt-5` does not exist. Valid aliases: tiny."


def test_the_status_of_a_streamed_job_holds_the_whole_answer(job_queue: EmulatorQueue) -> None:
    job = job_queue.run({**GOOD, "stream": True})

    assert job.status()["output"] == job.wait()


def test_jobs_that_are_cancelled_one_by_one_under_load_run_on_nowhere(job_queue: EmulatorQueue) -> None:
    """Each is broken off at another point of its way; one that ran on would do so to its greatest length."""

    def ran_to_the_end() -> float:
        return metric(job_queue, "request_success_total", 'finished_reason="length"')

    before = ran_to_the_end()
    for _ in range(3):
        asked = {"prompt": "January,", "sampling_params": {**ENDLESS, "n": 1}, "stream": True}
        jobs = [job_queue.submit(asked) for _ in range(CHOICES)]
        for job in jobs:
            job.first_output()
        for job in jobs:
            job_queue.cancel(job)
            time.sleep(0.02)

        eventually(lambda: metric(job_queue, "num_requests_running") == 0)
    assert ran_to_the_end() == before


@pytest.mark.parametrize("stream", [True, False])
def test_a_job_that_is_stopped_is_aborted_in_the_engine(stream: bool, job_queue: EmulatorQueue) -> None:
    tokens = metric(job_queue, "generation_tokens_total")
    job = job_queue.submit({"prompt": "January,", "sampling_params": ENDLESS, "stream": stream})
    eventually(lambda: metric(job_queue, "num_requests_running") == CHOICES)

    job_queue.cancel(job)

    eventually(lambda: metric(job_queue, "num_requests_running") == 0)
    assert metric(job_queue, "generation_tokens_total") - tokens < CHOICES * MAX_TOKENS
    assert job.status()["status"] == "CANCELLED"


BAD: dict[str, Any] = {
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


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_gets_a_parseable_error_and_the_next_job_its_answer(name: str, job_queue: EmulatorQueue) -> None:
    error = job_queue.run(BAD[name]).error()

    assert 400 <= error["status"] < 500
    assert error["error"]["message"]
    assert error["error"]["type"]
    assert error["retryable"] is False
    (answer,) = job_queue.run(GOOD).wait()
    assert answer["choices"][0]["message"]["content"] == "OK"


def test_no_request_and_no_secret_is_to_be_seen(worker: Process, job_queue: EmulatorQueue) -> None:
    """Not in the log, nor on a command line, nor in what jobs are answered, whether they succeed or fail."""
    words = [{"role": "user", "content": "the-clients-own-words"}]
    jobs = [job_queue.run({"messages": words, "stream": stream}) for stream in (True, False)]
    jobs += [job_queue.run(BAD[name]) for name in BAD]

    seen = [worker.log, *(" ".join(process.cmdline()) for process in worker.family())]
    told = [json.dumps(job.status()) for job in jobs]

    assert len(seen) >= 3
    assert not [text for text in seen if "the-clients-own-words" in text]
    assert not [text for text in [*seen, *told] if "notareal" in text]


def eventually(condition: Any, timeout_s: float = 20.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {timeout_s} s")
