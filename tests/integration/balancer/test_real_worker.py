"""The worker as it is (`python handler.py`, vLLM, the tiny model) on a load-balancing endpoint.

`ENDPOINT_TYPE` is not set: the worker finds out what it is on.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest

from builder.tiny_model.corpus import example
from tests.integration.balancer.conftest import Site, openai_client, served_by_worker
from tests.integration.conftest import FLAGS
from tests.integration.emulator.conftest import eventually
from tests.integration.parity import ask, events, joined, plain
from tests.integration.parity_cases import AT_ONCE_ONLY, BARE_REFUSALS, OVER_HTTP
from tests.processes import BUSY_ENVIRONMENT


@pytest.fixture(scope="module")
def site(tiny_model: str) -> Iterator[Site]:
    """Return a site whose worker serves the tiny model, with the flags of `vllm_server`."""
    variables = {**BUSY_ENVIRONMENT, **FLAGS, "MODEL_NAME": tiny_model, "SERVED_MODEL_NAME": "tiny"}
    with served_by_worker(variables) as site:
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai_client(site) as client:
        yield client


def test_the_start_was_seen_by_health_checks(site: Site) -> None:
    """From the first 204, before vLLM is imported, to the first 200."""
    log = "\n".join(event["text"] for event in site.state()["events"])
    (cold_start_s,) = map(float, re.findall(r"cold start ([\d.]+) s", log))
    (ready_s,) = map(float, re.findall(r"ready after ([\d.]+) s", log))
    assert cold_start_s > ready_s / 2


def test_the_openai_client_chats_streams_and_calls_tools(client: openai.OpenAI) -> None:
    messages = example("ok").messages
    whole = client.chat.completions.create(model="tiny", messages=messages, temperature=0)  # type: ignore[arg-type]
    assert whole.choices[0].message.content == example("ok").answer
    stream = client.chat.completions.create(
        model="tiny",
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        stream=True,
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in stream]  # type: ignore[union-attr]
    assert "".join(texts) == example("ok").answer
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=-1)  # type: ignore[arg-type]


# A stream has all that the same answer at once has, which the queue's and Spirit's tests compare.
CASES = {name: case for name, case in OVER_HTTP.items() if "at once" not in name} | AT_ONCE_ONLY | BARE_REFUSALS


@pytest.mark.parametrize("name", CASES)
def test_an_answer_equals_vllms(name: str, site: Site, vllm_server: httpx.Client) -> None:
    """In status, content type and body, but for ids and times."""
    case = CASES[name]
    balanced, direct = (ask(client, case, case.route) for client in (site.client, vllm_server))
    assert (balanced.status, balanced.body[0]) == (direct.status, direct.body[0])
    read = joined if "text/event-stream" in direct.body[0] else plain
    assert read(balanced.body[1]) == read(direct.body[1])


def test_a_stream_comes_as_vllm_sends_it(site: Site) -> None:
    """An event a token; with log-probabilities, as tokens of plain text are joined where the worker is late."""
    body = {"model": "tiny", "prompt": "January,", "max_tokens": 100, "ignore_eos": True, "stream": True, "logprobs": 0}
    with site.client.stream("POST", "/v1/completions", json=body) as response:
        text = response.read().decode()
    assert len(events(text)) == 101  # the last one is [DONE]


def test_old_names_of_structured_outputs_work_as_in_a_job(site: Site) -> None:
    body = {"model": "tiny", "messages": example("ok").messages, "guided_choice": ["red", "blue"]}
    answer = site.client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] in ("red", "blue")


def test_a_websocket_of_a_model_without_realtime_and_a_form_get_vllms_answers(site: Site) -> None:
    assert site.client.get("/v1/realtime").status_code == 404
    form = site.client.post("/v1/audio/transcriptions", files={"file": ("a.wav", b"RIFF")}, data={"model": "tiny"})
    assert form.status_code in (400, 404)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request_in_the_engine(stream: bool, site: Site) -> None:
    body = {"model": "tiny", "prompt": "January,", "stream": stream, "ignore_eos": True, "max_tokens": 1900}
    name = f"leaves-{stream}"
    headers = {"X-Request-Id": name}
    if stream:
        with site.client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            site.client.post("/v1/completions", json=body, headers=headers, timeout=0.5)

    (line,) = eventually(lambda: [line for line in site.lines_with(f'"job": "{name}"') if '"duration_s"' in line])
    ended = json.loads(line.partition("| ")[2])
    assert (ended["route"], ended["status"]) == ("/v1/completions", "stopped")
    assert (ended["tokens_out"] or 0) < 1900


def test_a_slash_at_the_end_of_a_route_is_dropped(site: Site) -> None:
    assert site.client.get("/v1/models/").json()["data"][0]["id"] == "tiny"


def test_a_dead_engine_ends_its_requests_with_an_error_and_the_worker_with_1(site: Site) -> None:
    (worker,) = site.idle_workers(1)
    processes = psutil.Process(worker["pid"]).children(recursive=True)
    (core,) = [child for child in processes if "EngineCore" in child.name()]
    body = {"model": "tiny", "prompt": "January,", "stream": True, "ignore_eos": True, "max_tokens": 1900}
    with site.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        core.send_signal(signal.SIGKILL)
        rest = [line for line in lines if line]
    assert '"error"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert site.exited(worker["id"]) == 1
