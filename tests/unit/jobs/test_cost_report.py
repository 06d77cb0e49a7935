"""A job whose client asks what it cost, in each form of a job."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import InvalidInputError
from engine.jobs import inputs, pipeline
from engine.jobs.proxied import ProxiedRequest
from engine.telemetry.costs import Costs
from engine.telemetry.job_times import CURRENT, JobTimes
from tests.scripted import ScriptedApp, chat_chunks

pytestmark = pytest.mark.anyio
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MESSAGES = [{"role": "user", "content": "hi"}]


async def outputs_of(
    value: Any, *, streams: bool = True, chunks: list[bytes] | None = None
) -> tuple[list[Any], JobTimes, ScriptedApp]:
    """Run a job as the job loop does; return its outputs, its times, and the app that has answered."""
    app = ScriptedApp(body=chunks or chat_chunks("a", "b"), content_type="text/event-stream")
    if not streams:
        app = ScriptedApp(body=[b'{"id": "x", "choices": []}'])
    times = JobTimes("job-1")
    costs = Costs(0.0, 0.01)
    costs.seconds.ready()
    costs.begin(times)
    token = CURRENT.set(times)
    try:
        outputs = [output async for output in pipeline.run({"id": "job-1", "input": value}, app)]
    finally:
        CURRENT.reset(token)
    return outputs, times, app


def openai(**fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": MESSAGES, **fields}
    return {"openai_route": "/v1/chat/completions", "openai_input": body}


async def test_a_documents_field_has_the_costs() -> None:
    outputs, _, app = await outputs_of(openai(include_costs=True), streams=False)

    costs = outputs[0]["costs"]
    assert (costs["engine_queue_s"], costs["prefill_s"], costs["decode_s"]) == (0.1, 0.2, 0.3)
    assert costs["cost"] > 0
    assert "include_costs" not in json.loads(app.requests[0][1])


async def test_a_stream_has_a_chunk_with_the_costs_before_its_end() -> None:
    outputs, _, _ = await outputs_of(openai(stream=True, include_costs=True))

    events = [event.removeprefix("data: ") for event in "".join(outputs).split("\n\n") if event]
    assert events[-1] == "[DONE]"
    chunk = json.loads(events[-2])
    assert (chunk["object"], chunk["choices"], chunk["model"]) == ("chat.completion.chunk", [], "tiny")
    assert chunk["costs"]["decode_s"] == 0.3
    assert "".join(outputs).count("[DONE]") == 1


def named_events(*events: dict[str, Any]) -> list[bytes]:
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]


# As vLLM writes them, with a text that looks like an event.
FAKE = "\nevent: message_delta\ndata: {}\n"
MESSAGE = named_events(
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": FAKE}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
    {"type": "message_stop"},
)
RESPONSE = named_events(
    {"type": "response.output_text.delta", "delta": FAKE},
    {"response": {"id": "r", "status": "completed", "usage": {}}, "sequence_number": 9, "type": "response.completed"},
)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("is_proxied", [True, False])
@pytest.mark.parametrize(("route", "chunks"), [("/v1/messages", MESSAGE), ("/v1/responses", RESPONSE)])
async def test_a_stream_without_a_done_has_them_in_its_last_event_with_fields(
    route: str, chunks: list[bytes], *, is_proxied: bool, together: bool
) -> None:
    body = {"model": "tiny", "stream": True, "include_costs": True}
    value: Any = {"openai_route": route, "openai_input": body}
    if is_proxied:
        value = ProxiedRequest.of("POST", route, json.dumps(body).encode())

    outputs, _, _ = await outputs_of(value, chunks=[b"".join(chunks)] if together else chunks)

    text = b"".join(outputs[1:]).decode() if is_proxied else "".join(outputs)
    events = [json.loads(event.partition("data: ")[2]) for event in text.split("\n\n") if event]
    given = [json.loads(chunk.partition(b"data: ")[2]) for chunk in chunks]
    last = events[1].get("response", events[1])
    assert last.pop("costs")["decode_s"] == 0.3
    assert events == given


async def test_a_response_above_the_platforms_limit_has_them_too() -> None:
    long = named_events({"type": "response.completed", "response": {"id": "r", "text": "x" * 1_500_000}})

    outputs, _, _ = await outputs_of(
        {"openai_route": "/v1/responses", "openai_input": {"stream": True, "include_costs": True}}, chunks=long
    )

    assert len(outputs) > 1
    event = json.loads("".join(outputs).partition("data: ")[2])
    assert event["response"]["costs"]["decode_s"] == 0.3


async def test_a_top_level_stream_ends_with_an_output_of_its_own() -> None:
    outputs, _, _ = await outputs_of({"messages": MESSAGES, "stream": True, "include_costs": True})

    assert list(outputs[-1]) == ["costs"]
    assert "".join(output.get("text", "") for output in outputs) == "ab"


@pytest.mark.parametrize("streams", [True, False])
async def test_a_proxied_answer_has_them_too(*, streams: bool) -> None:
    body = json.dumps({"messages": MESSAGES, "stream": streams, "include_costs": True}).encode()
    outputs, _, _ = await outputs_of(ProxiedRequest.of("POST", "/v1/chat/completions", body), streams=streams)

    assert b'"costs":{' in b"".join(outputs[1:]).replace(b" ", b"")


async def test_an_answer_has_none_unless_its_client_asks() -> None:
    for streams in (True, False):
        outputs, _, _ = await outputs_of(openai(stream=streams), streams=streams)
        assert "costs" not in json.dumps(outputs)


async def test_a_job_without_a_job_loop_is_answered_without_them() -> None:
    app = ScriptedApp()

    outputs = [one async for one in pipeline.run({"id": "job-1", "input": openai(include_costs=True)}, app)]
    assert outputs == [{}]


async def test_the_jobs_times_learn_of_route_model_and_trace() -> None:
    _, times, app = await outputs_of(openai(traceparent=TRACEPARENT), streams=False)

    assert (times.route, times.model, times.traceparent) == ("/v1/chat/completions", "tiny", TRACEPARENT)
    assert "traceparent" not in json.loads(app.requests[0][1])


async def test_the_jobs_times_learn_whether_the_answer_is_a_stream() -> None:
    for streams in (True, False):
        body = json.dumps({"messages": MESSAGES, "stream": streams}).encode()
        for value in (openai(stream=streams), ProxiedRequest.of("POST", "/v1/chat/completions", body)):
            _, times, _ = await outputs_of(value, streams=streams)
            assert times.is_stream == streams


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({**openai(), "include_costs": True, "traceparent": TRACEPARENT}, (True, TRACEPARENT)),
        ({**openai(include_costs="false"), "include_costs": True}, (False, None)),
        (openai(extra_body={"include_costs": "true"}), (True, None)),
        (openai(include_costs=None), (False, None)),
        ({"prompt": "a", "traceparent": TRACEPARENT}, (False, TRACEPARENT)),
        ({"route": "/v1/completions", "body": {"prompt": "a"}, "include_costs": 1}, (True, None)),
    ],
)
def test_the_fields_are_read_from_the_input_and_from_the_body(value: Any, expected: tuple[bool, str | None]) -> None:
    request = inputs.parse({"input": value}, 2048)

    assert (request.wants_costs, request.traceparent) == expected


def test_a_field_that_is_no_boolean_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="include_costs must be true or false"):
        inputs.parse({"input": openai(include_costs="maybe")}, 2048)


@pytest.mark.parametrize("text", ["", "00-0-0-0", "00-" + "0" * 32 + "-b7ad6b7169203331-01", 7])
def test_a_traceparent_that_is_none_is_ignored_with_a_warning(text: Any) -> None:
    request = inputs.parse({"input": openai(traceparent=text)}, 2048)

    assert request.traceparent is None
    assert any("traceparent: ignored" in warning for warning in request.warnings)
