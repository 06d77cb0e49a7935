"""A job from its input to its last output, with a scripted app instead of vLLM's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from engine.backend.app import App
from engine.jobs import pipeline
from tests.scripted import ScriptedApp, chat_chunks, sse

pytestmark = pytest.mark.anyio
CHAT = {"openai_route": "/v1/chat/completions", "openai_input": {"messages": [], "stream": True}}
TOP_LEVEL = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
IGNORED = "batch_size: ignored, as BATCH_INTERVAL_MS of the worker sets the size of batches"
ERROR_BODY = {"error": {"message": "漢: no such model", "type": "NotFoundError", "param": "model", "code": 404}}


async def outputs_of(app: ScriptedApp, value: Any) -> list[Any]:
    return [output async for output in pipeline.run({"id": "job-1", "input": value}, app)]


def error_of(outputs: list[Any]) -> dict[str, Any]:
    """Return the error that ends the job, parsed as a client parses it."""
    assert list(outputs[-1]) == ["error"]
    document = json.loads(str(outputs[-1]["error"]))
    assert isinstance(document, dict)
    return document


async def test_a_streamed_openai_job_yields_vllms_events_as_text() -> None:
    chunks = chat_chunks("漢", "😀")

    outputs = await outputs_of(ScriptedApp(body=chunks, content_type="text/event-stream; charset=utf-8"), CHAT)

    assert "".join(outputs).encode() == b"".join(chunks)
    assert all(output.endswith("\n\n") for output in outputs)


async def test_characters_that_are_split_over_chunks_arrive_complete() -> None:
    data = b"".join(chat_chunks("漢字😀"))

    outputs = await outputs_of(
        ScriptedApp(body=[bytes([byte]) for byte in data], content_type="text/event-stream"), CHAT
    )

    assert "".join(outputs).encode() == data


async def test_a_streamed_top_level_job_yields_dicts_with_the_new_text() -> None:
    app = ScriptedApp(body=chat_chunks("a", "b", "c"), content_type="text/event-stream", pause_s=0.001)

    outputs = await outputs_of(app, TOP_LEVEL)

    assert "".join(output["text"] for output in outputs) == "abc"
    assert outputs[-1]["finish_reason"] == "stop"


async def test_a_response_that_is_not_streamed_is_one_output_of_json() -> None:
    answer = {"choices": [{"message": {"content": "漢"}}], "usage": {"n": 1.25}}
    body = json.dumps(answer, ensure_ascii=False).encode()

    assert await outputs_of(ScriptedApp(body=[body[:20], body[20:]]), CHAT) == [answer]


@pytest.mark.parametrize(
    ("content_type", "body", "output"),
    [("application/json", b"", ""), ("text/plain; charset=utf-8", "é".encode(), "é"), ("application/json", b"[]", [])],
)
async def test_empty_and_plain_text_responses_are_outputs(content_type: str, body: bytes, output: Any) -> None:
    assert await outputs_of(ScriptedApp(body=[body], content_type=content_type), CHAT) == [output]


async def test_a_binary_response_is_an_error_that_names_its_type() -> None:
    app = ScriptedApp(body=[b"RIFF\xff"], content_type="audio/wav")

    assert "audio/wav" in error_of(await outputs_of(app, CHAT))["error"]["message"]


async def test_an_error_response_keeps_its_status_type_code_and_message() -> None:
    app = ScriptedApp(body=[json.dumps(ERROR_BODY).encode()], status=404)

    assert error_of(await outputs_of(app, CHAT)) == {**ERROR_BODY, "status": 404, "retryable": False}


async def test_an_unknown_status_is_passed_on() -> None:
    document = error_of(await outputs_of(ScriptedApp(body=[b""], status=499), CHAT))

    assert (document["status"], document["error"]["type"]) == (499, "Status 499")


async def test_a_successful_response_with_an_error_field_is_an_output() -> None:
    """VLLM's responses have this field, and those of other routes may."""
    answer = {"object": "response", "status": "incomplete", "error": {"code": "x", "message": "cut"}}

    assert await outputs_of(ScriptedApp(body=[json.dumps(answer).encode()]), CHAT) == [answer]


@pytest.mark.parametrize("body", [b"Bad gateway", b"[]", b'"x"', b"", b'{"detail":"No"}', b"{}"])
async def test_an_error_response_without_an_error_body_gets_one(body: bytes) -> None:
    document = error_of(await outputs_of(ScriptedApp(body=[body], status=502, content_type="text/plain"), CHAT))

    assert document["status"] == document["error"]["code"] == 502
    assert document["error"]["message"]
    assert document["retryable"] is True


async def test_an_invalid_input_does_not_reach_the_engine() -> None:
    app = ScriptedApp()

    document = error_of(await outputs_of(app, {"text": "hi"}))

    assert (document["status"], document["error"]["type"]) == (400, "BadRequestError")
    assert app.requests == []


async def test_a_response_that_breaks_off_fails_the_job_as_retryable_and_keeps_its_outputs() -> None:
    chunks = chat_chunks("a")[:2]
    app = ScriptedApp(body=chunks, content_type="text/event-stream", fails=True)

    outputs = await outputs_of(app, CHAT)

    assert "".join(outputs[:-1]).encode() == b"".join(chunks)
    assert error_of(outputs)["retryable"] is True


async def test_an_engine_that_raises_fails_the_job_with_an_error_without_details() -> None:
    class Broken(ScriptedApp):
        async def app(self) -> App:
            raise RuntimeError("secret detail")

    outputs = await outputs_of(Broken(), CHAT)

    assert error_of(outputs)["status"] == 500
    assert "secret" not in str(outputs)


async def test_an_error_event_in_a_top_level_stream_fails_the_job() -> None:
    app = ScriptedApp(body=[*chat_chunks("a")[:2], *sse(ERROR_BODY)], content_type="text/event-stream", pause_s=0.001)

    outputs = await outputs_of(app, TOP_LEVEL)

    assert outputs[0]["text"] == "a"
    assert error_of(outputs)["error"] == ERROR_BODY["error"]


async def test_the_request_has_ended_when_the_error_is_yielded() -> None:
    """The SDK does not resume or close the generator after an error."""
    app = ScriptedApp(
        body=[*chat_chunks("a")[:2], *sse(ERROR_BODY), b"x" * 9], content_type="text/event-stream", pause_s=0.01
    )
    before = asyncio.all_tasks()

    async for output in pipeline.run({"id": "1", "input": TOP_LEVEL}, app):
        if "error" in output:
            assert asyncio.all_tasks() == before
            assert app.disconnects == 1


async def test_closing_the_generator_disconnects_from_vllm() -> None:
    app = ScriptedApp(body=chat_chunks(*"abcdefgh"), content_type="text/event-stream", pause_s=0.01)
    outputs = pipeline.run({"id": "1", "input": CHAT}, app)

    await anext(outputs)
    await outputs.aclose()

    assert app.disconnects == 1


async def test_cancelling_the_consumer_during_a_delivery_disconnects_from_vllm() -> None:
    """The SDK's own loop does not close the generator then; here a reference to it remains."""
    app = ScriptedApp(body=chat_chunks(*"abcdefgh"), content_type="text/event-stream", pause_s=0.01)
    generators = []
    delivering = asyncio.Event()

    async def handler() -> AsyncGenerator[Any, None]:
        outputs = pipeline.run({"id": "1", "input": CHAT}, app)
        async with pipeline.aclosing_on_task_exit(outputs):
            async for output in outputs:
                yield output

    async def consume() -> None:
        generators.append(handler())
        async for _ in generators[0]:
            delivering.set()
            await asyncio.Event().wait()

    consumer = asyncio.ensure_future(consume())
    await delivering.wait()
    consumer.cancel()
    await asyncio.wait({consumer})
    async with asyncio.timeout(10):
        await app.disconnected.wait()
    await generators[0].aclose()


async def test_a_slow_consumer_gets_all_buffered_events_in_one_output() -> None:
    app = ScriptedApp(body=chat_chunks(*"abcdefgh"), content_type="text/event-stream", pause_s=0.001)
    outputs = []

    async for output in pipeline.run({"id": "1", "input": CHAT}, app):
        outputs.append(output)
        await app.completed.wait()

    assert len(outputs) == 2


async def test_the_first_and_the_last_output_do_not_wait_for_the_batch_interval() -> None:
    body = chat_chunks(*"abcdefgh")
    app = ScriptedApp(body=body, content_type="text/event-stream", pause_s=0.001, batch_interval_s=60)

    async with asyncio.timeout(10):
        outputs = await outputs_of(app, CHAT)

    assert len(outputs) == 2


ERROR = {"error": {"message": "the engine stumbled", "type": "InternalServerError", "param": None, "code": 500}}
RESPONSES_ERROR = {"code": "server_error", "message": "the engine stumbled"}


@pytest.mark.parametrize(
    ("route", "ends_with", "error"),
    [
        ("/v1/chat/completions", [ERROR], ERROR["error"]),
        ("/v1/completions", [ERROR], ERROR["error"]),
        ("/v1/messages", [{"type": "error", **ERROR}], ERROR["error"]),
        (
            "/v1/responses",
            [{"type": "response.failed", "response": {"status": "failed", "error": RESPONSES_ERROR}}],
            RESPONSES_ERROR,
        ),
    ],
)
async def test_an_error_event_at_the_end_of_a_stream_fails_the_job_and_appears_once(
    route: str, ends_with: list[dict[str, Any]], error: dict[str, Any]
) -> None:
    first = {"type": "response.created", "response": {"error": None}, "text": 'he said "error"'}
    body = [*sse(first, *ends_with), b"data: [DONE]\n\n"]
    app = ScriptedApp(body=body, content_type="text/event-stream", pause_s=0.05)

    outputs = await outputs_of(app, {"openai_route": route, "openai_input": {"stream": True}})

    assert "".join(outputs[:-1]).encode() == b"".join(body)
    assert error_of(outputs) == {"error": error, "status": 500, "retryable": False}


@pytest.mark.parametrize(("status", "retryable"), [(400, False), (429, True), (500, False), (501, False), (503, True)])
async def test_only_errors_that_may_pass_are_retryable(status: int, retryable: bool) -> None:
    app = ScriptedApp(body=[json.dumps(ERROR).encode()], status=status)

    assert error_of(await outputs_of(app, CHAT))["retryable"] is retryable


async def test_a_large_event_between_others_of_a_top_level_job_is_complete() -> None:
    """As with `echo` and log-probabilities of a long prompt."""
    text = "x" * 2_500_000
    app = ScriptedApp(body=chat_chunks("a", text, "b"), content_type="text/event-stream", pause_s=0.01)

    outputs = await outputs_of(app, TOP_LEVEL)

    assert "".join(output["text"] for output in outputs) == f"a{text}b"


async def test_a_top_level_answer_has_the_fields_that_langchain_reads_in_addition_to_vllms() -> None:
    answer = {
        "choices": [
            {"index": 0, "message": {"content": "hi"}},
            {"index": 1, "text": "ho"},
            {"message": {"content": None}},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    app = ScriptedApp(body=[json.dumps(answer).encode()])

    (top_level,) = await outputs_of(app, {"prompt": "x"})
    (openai,) = await outputs_of(app, {"openai_input": {"messages": []}})

    assert [choice.pop("tokens") for choice in top_level["choices"]] == [["hi"], ["ho"], [""]]
    assert (top_level["usage"].pop("input"), top_level["usage"].pop("output")) == (3, 2)
    assert top_level == openai == answer


async def test_ignored_fields_of_a_top_level_job_are_warnings_in_its_answer() -> None:
    app = ScriptedApp(body=[b'{"choices": []}'])

    (answer,) = await outputs_of(app, {"prompt": "x", "batch_size": 5})

    assert answer == {"choices": [], "warnings": [IGNORED]}


@pytest.mark.parametrize("value", [{"prompt": "x"}, {"openai_input": {"messages": []}}], ids=["top level", "openai"])
async def test_ignored_fields_of_any_job_are_logged_with_its_id(
    value: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    await outputs_of(ScriptedApp(), {**value, "batch_size": 5})

    assert caplog.messages == [f"Job job-1: {IGNORED}"]


async def test_what_was_ignored_of_a_stream_is_in_its_first_dict() -> None:
    app = ScriptedApp(body=chat_chunks("a", "b"), content_type="text/event-stream", pause_s=0.01)

    outputs = await outputs_of(app, {**TOP_LEVEL, "batch_size": 5})

    assert [output.get("warnings") for output in outputs] == [[IGNORED], *[None] * (len(outputs) - 1)]


async def test_an_event_above_the_output_limit_of_a_top_level_stream_is_split() -> None:
    text = "x" * 2_500_000
    app = ScriptedApp(body=chat_chunks(text), content_type="text/event-stream")

    outputs = await outputs_of(app, TOP_LEVEL)

    assert len(outputs) > 2
    assert max(len(json.dumps({"output": output})) for output in outputs) <= 1_000_000
    assert "".join(output["text"] for output in outputs) == text


async def test_a_route_that_vllm_does_not_have_is_an_error_404() -> None:
    app = ScriptedApp(unknown_routes=frozenset({"/v1/v1/chat/completions"}))

    document = error_of(await outputs_of(app, {"openai_route": "/v1/v1/chat/completions"}))

    assert (document["status"], document["error"]["type"]) == (404, "NotFoundError")
    assert app.requests == []
