"""Answers from the queue equal those of vLLM's own server, in status and body, except for ids and times.

Streams are compared event by event, after adjacent parts of one text are joined: vLLM joins them itself when its client
is slower than the engine. Streams of one token have nothing to join, and are compared unchanged.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import pytest

from engine.backend.routes import SERVING
from tests.integration.parity import ParityClient, events, joined, plain
from tests.integration.parity_cases import (
    AT_ONCE_ONLY,
    BARE_REFUSALS,
    BOTH_WAYS,
    CLASSIFIED,
    EMBEDDED,
    NOT_COMPARED,
    OF_ONE_TOKEN,
    REFUSED,
    STREAMED_ONLY,
    USAGE,
    Case,
    chat,
)

if TYPE_CHECKING:
    import httpx

    from tests.emulator_queue import EmulatorQueue

pytestmark = pytest.mark.usefixtures("worker")

AT_ONCE = {**BOTH_WAYS, **AT_ONCE_ONLY}


def _usage(case: Case) -> dict[str, Any]:
    """Return the option that requests usage, for the routes that need it."""
    return USAGE if case.route.endswith("/completions") else {}


STREAMED = {name: case.streamed(**_usage(case)) for name, case in BOTH_WAYS.items()} | STREAMED_ONLY


@pytest.fixture
def parity(job_queue: EmulatorQueue, vllm_server: httpx.Client) -> ParityClient:
    return ParityClient(job_queue, vllm_server)


@pytest.mark.parametrize("name", AT_ONCE)
def test_an_answer_equals_vllms(name: str, parity: ParityClient) -> None:
    queued, direct = parity.pair(AT_ONCE[name])

    assert direct.status == queued.status == HTTPStatus.OK
    assert plain(queued.body) == plain(direct.body)


@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_equals_vllms(name: str, parity: ParityClient) -> None:
    queued, direct = parity.pair(STREAMED[name], joined)

    assert direct.status == queued.status == HTTPStatus.OK
    assert joined(queued.body) == joined(direct.body)


@pytest.mark.parametrize("name", OF_ONE_TOKEN)
def test_a_stream_of_one_token_has_exactly_vllms_events(name: str, parity: ParityClient) -> None:
    queued, direct = parity.pair(OF_ONE_TOKEN[name], events)

    assert events(queued.body) == events(direct.body)
    assert len(events(direct.body)) > 1


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_response_equals_vllms(name: str, parity: ParityClient) -> None:
    queued, direct = parity.queued(REFUSED[name]), parity.direct(REFUSED[name])

    assert queued == direct
    assert direct.status >= HTTPStatus.BAD_REQUEST
    assert direct.body["error"]["message"]


@pytest.mark.parametrize("name", BARE_REFUSALS)
def test_an_error_response_without_an_error_body_gets_one(name: str, parity: ParityClient) -> None:
    queued, direct = parity.queued(BARE_REFUSALS[name]), parity.direct(BARE_REFUSALS[name])

    assert queued.status == direct.status
    assert queued.body["error"]["message"] == direct.body["detail"]


@pytest.mark.parametrize("name", ["tools, auto and called", "tools, required", "tools, named"])
def test_the_cases_with_tools_contain_a_tool_call(name: str, parity: ParityClient) -> None:
    (choice,) = parity.queued(BOTH_WAYS[name]).body["choices"]

    (call,) = choice["message"]["tool_calls"]
    # Which of the allowed values it takes is a near tie.
    allowed = [{"city": city, "days": days} for city in ("Paris", "Rome") for days in (1, 2)]
    assert json.loads(call["function"]["arguments"]) in [{}, *allowed]


def test_the_case_with_reasoning_contains_reasoning(parity: ParityClient) -> None:
    (choice,) = parity.queued(BOTH_WAYS["reasoning"]).body["choices"]

    assert choice["message"]["reasoning"].strip() == "the sky scatters."
    assert choice["message"]["content"].strip() in ("blue.", "blue!")


def test_every_allowed_route_is_compared() -> None:
    tables = (AT_ONCE, STREAMED, EMBEDDED, CLASSIFIED)
    compared = {case.route for table in tables for case in table.values()}

    assert compared | NOT_COMPARED.keys() == SERVING
    assert not compared & NOT_COMPARED.keys()


def test_the_first_batch_arrives_before_the_answer_is_complete(job_queue: EmulatorQueue) -> None:
    # Half a minute of work: the first batch arrives long before its end, even on a busy machine.
    case = chat("long-story", n=24, temperature=1, max_tokens=1900, ignore_eos=True).streamed()

    job = job_queue.submit({"openai_route": case.route, "openai_input": case.body})
    first = job.first_output()

    assert events(first)
    assert job.status()["status"] == "IN_PROGRESS"
    job_queue.cancel(job)
    job.wait()
    assert job.status()["status"] == "CANCELLED"
