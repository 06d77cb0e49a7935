"""The stock SDK (spirit-gpu 0.1.0) in proxy mode against the emulator: what works, and its faults.

The tests document each fault, which this repository's own worker must not have.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.integration.emulator.conftest import eventually
from tests.integration.emulator.spirit.conftest import ID, KEY, Site, Start

# The template's, with the service and its key in their places (serverless-vllm/README.md).
_CURL = """curl https://api-serverless.datastone.cn/v1/chat/completions \\
    -H "Content-Type: application/json" -H "Authorization: {severless-id}-{serverless-key}" \\
    -d '{
        "model": "/workspace/vllm/phi-4-bnb-4bit",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Write a python game program"}
        ]
    }'"""
_LEFT = "the local server's client has disconnected"


def events(lines: Iterator[str]) -> Iterator[str]:
    """Return the text of each event of a stream, and `[DONE]`."""
    for line in lines:
        if line == "data: [DONE]":
            yield "[DONE]"
        elif line:
            yield json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"]


def test_the_templates_curl_works_word_for_word(start_proxy: Start) -> None:
    site = start_proxy()
    command = _CURL.replace("{severless-id}", ID).replace("{serverless-key}", KEY)
    command = command.replace("https://api-serverless.datastone.cn", site.url)
    ran = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    answer = json.loads(ran.stdout)
    assert answer["choices"][0]["message"]["content"] == "echo: Write a python game program"
    assert answer["model"] == "/workspace/vllm/phi-4-bnb-4bit"


def test_an_openai_client_streams_event_by_event(start_proxy: Start) -> None:
    """Each event arrives before the local server makes the next one.

    The client leaves at `[DONE]`, before or after the body has ended: whether the task succeeds depends on that.
    """
    site = start_proxy(env={"PAUSE_S": "0.4"})
    site.idle_worker()
    key = f"{ID}-{KEY}"
    client = openai.OpenAI(
        base_url=f"{site.url}/v1", api_key=key, default_headers={"Authorization": key}, max_retries=0
    )
    with client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "one two three"}], stream=True
        )
        arrived = [(chunk.choices[0].delta.content, time.monotonic()) for chunk in stream]
    assert [text for text, _ in arrived] == ["one", "two", "three"]
    assert arrived[-1][1] - arrived[0][1] >= 0.7
    (task,) = site.ended()
    assert (task["kind"], task["outputs"] >= 3) == ("/v1/chat/completions", True)


def test_ollamas_paths_and_other_methods_reach_the_local_server(start_proxy: Start) -> None:
    site = start_proxy()
    ollama = httpx.get(f"{site.url}/api/tags", headers={"Authorization": f"{ID}-{KEY}"}, timeout=30)
    assert ollama.json() == {"models": [{"name": "tiny"}]}
    seen = site.openai.delete("/seen", headers={"X-Mine": "1"}).json()
    headers = dict(seen["headers"])
    assert (seen["method"], headers["x-mine"], headers["authorization"]) == ("DELETE", "1", f"{ID}-{KEY}")
    assert headers["host"].startswith("127.0.0.1:")


def test_heartbeats_are_sent_and_no_task_is_taken_while_the_model_loads(start_proxy: Start) -> None:
    site = start_proxy(env={"LOADS_S": "2"}, heartbeatInterval=1)
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(site.openai.post, "/chat/completions", json=site.chat("hello"))
        assert response.result(60).status_code == 200
    worker = site.state()["workers"][0]
    assert worker["readyAt"] - worker["startedAt"] >= 2


@pytest.mark.parametrize("answer_early", [False, True])
def test_a_client_that_leaves_ends_the_local_servers_request(start_proxy: Start, answer_early: bool) -> None:
    """By the end of the connection the task fails and is answered twice; by an early 200 it succeeds."""
    site = start_proxy(env={"PAUSE_S": "0.2"}, answerEarly=answer_early)
    site.idle_worker()
    body = site.chat("word " * 500, stream=True)
    with site.openai.stream("POST", "/chat/completions", json=body) as response:
        assert next(events(response.iter_lines())) == "word"
    eventually(lambda: _LEFT in site.log())
    (task,) = site.ended()
    assert (task["status"], task["answers"]) == (("succeed", [200]) if answer_early else ("failed", [200, 500]))


def test_four_requests_at_once_are_not_mixed_up(start_proxy: Start) -> None:
    site = start_proxy(env={"PAUSE_S": "0.01"})
    site.idle_worker()

    def stream(number: int) -> list[str]:
        body = site.chat(f"{number} " * 20, stream=True)
        with site.openai.stream("POST", "/chat/completions", json=body) as response:
            return list(events(response.iter_lines()))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(stream, range(8)))
    assert answers == [[str(number)] * 20 + ["[DONE]"] for number in range(8)]


# Faults of the SDK.


def test_an_answer_other_than_200_is_forwarded_and_then_counts_as_a_failure(start_proxy: Start) -> None:
    """With a second POST, of a 500, for the same task."""
    site = start_proxy()
    response = site.openai.post("/chat/completions", json=site.chat("hello", model="no-such-model"))
    assert (response.status_code, response.json()) == (404, {"error": {"message": "no such model"}})
    (task,) = site.ended()
    assert (task["status"], task["answers"]) == ("failed", [404, 500])


def test_a_local_server_that_dies_cuts_the_stream_and_the_worker_with_it(start_proxy: Start) -> None:
    site = start_proxy(env={"PAUSE_S": "0.1"}, maxRetries=0)
    site.idle_worker()
    with site.openai.stream("POST", "/chat/completions", json=site.chat("one die two", stream=True)) as response:
        received: list[str] = []
        with pytest.raises(httpx.RemoteProtocolError):
            received.extend(events(response.iter_lines()))
    assert "[DONE]" not in received


def test_sigterm_cuts_a_stream(start_proxy: Start) -> None:
    site = start_proxy(env={"PAUSE_S": "0.1"}, maxRetries=0)
    worker = site.idle_worker()
    with site.openai.stream("POST", "/chat/completions", json=site.chat("word " * 500, stream=True)) as response:
        lines = events(response.iter_lines())
        assert next(lines) == "word"
        os.kill(worker["pid"], signal.SIGTERM)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)


def test_a_killed_workers_stream_is_cut_and_its_task_runs_again_for_nobody(start_proxy: Start) -> None:
    site = start_proxy(env={"PAUSE_S": "0.1"})
    worker = site.idle_worker()
    with site.openai.stream("POST", "/chat/completions", json=site.chat("one two three " * 5, stream=True)) as response:
        lines = events(response.iter_lines())
        assert next(lines) == "one"
        site.root.post(f"/workers/{worker['id']}/kill").raise_for_status()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    (task,) = site.ended()
    assert (task["retries"], task["workerId"] == worker["id"]) == (1, False)


def test_a_refused_answer_is_not_noticed(start_proxy: Start) -> None:
    """The agent's status is ignored: the task succeeds, and its client has nothing."""
    site = start_proxy(firstByte=2)
    site.idle_worker()
    site.faults({"kind": "error", "route": "request-proxy", "times": 1})
    response = site.openai.post("/chat/completions", json=site.chat("hello"))
    assert (response.status_code, response.json()) == (408, {"error": "request timeout"})
    (task,) = site.ended()
    assert (task["status"], task["answers"]) == ("succeed", [])


@pytest.mark.parametrize(
    ("body", "answers"),
    [
        ({"method": "GET", "uri": "/v1/seen", "header": {}, "body": "", "host": "x"}, [500]),
        ({"method": "GET", "uri": "/v1/seen", "header": None, "body": ""}, [500]),
        ({"method": "GET", "uri": "/v1/seen", "body": None}, []),
        ({"input": 1}, []),
        ({"method": "GET", "uri": "/v1/seen"}, [200]),
    ],
)
def test_a_task_must_have_the_keys_that_the_sdk_reads_and_no_others(
    start_proxy: Start, body: dict[str, Any], answers: list[int]
) -> None:
    """One that cannot be parsed has no answer at all."""
    site = start_proxy(firstByte=2)
    site.idle_worker()
    altered = base64.b64encode(json.dumps(body).encode()).decode()
    site.faults({"kind": "alter", "route": "request", "body": altered, "times": 1})
    response = site.openai.get("/seen")
    assert response.status_code == (answers or [408])[0]
    (task,) = site.ended()
    assert (task["status"], task["answers"]) == ("succeed" if answers == [200] else "failed", answers)


def test_a_sync_request_reaches_a_worker_in_proxy_mode_and_has_no_answer(start_proxy: Start) -> None:
    """Nothing tells the platform in which mode a worker runs."""
    site = start_proxy(syncTtl=2)
    site.idle_worker()
    assert site.sync({"echo": 1}).json() == {"error": "request timeout"}
    (task,) = site.ended()
    assert (task["status"], task["answers"]) == ("failed", [])


def test_an_absolute_uri_leaves_the_local_server(start_proxy: Start) -> None:
    """The worker would call any address for an agent that let one through; the emulator's gateway does not."""
    site: Site = start_proxy()
    site.idle_worker()
    document = {"method": "GET", "uri": f"{site.url}/state", "header": {}, "body": ""}
    altered = base64.b64encode(json.dumps(document).encode()).decode()
    site.faults({"kind": "alter", "route": "request", "body": altered, "times": 1})
    assert site.openai.get("/seen").json().keys() == {"at", "endpoints"}
