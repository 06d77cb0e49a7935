"""A job from its input to its last output, on the scripted engine."""

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
NATIVE = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
IGNORED = "batch_size: ignored, as BATCH_INTERVAL_MS of the worker sets the size of batches"
REFUSAL = {"error": {"message": "漢: no such model", "type": "NotFoundError", "param": "model", "code": 404}}


async def outputs_of(app: ScriptedApp, value: Any) -> list[Any]:
    return [output async for output in pipeline.run({"id": "job-1", "input": value}, app)]


def error_of(outputs: list[Any]) -> dict[str, Any]:
    """The error that ends the job, read as a client of the SDK reads it."""
    assert list(outputs[-1]) == ["error"]
    document = json.loads(str(outputs[-1]["error"]))
    assert isinstance(document, dict)
    return document


async def test_a_streamed_openai_job_yields_the_engines_events_as_text() -> None:
    chunks = chat_chunks("漢", "😀")

    outputs = await outputs_of(ScriptedApp(body=chunks, content_type="text/event-stream; charset=utf-8"), CHAT)

    assert "".join(outputs).encode() == b"".join(chunks)
    assert all(output.endswith("\n\n") for output in outputs)


async def test_characters_cut_by_the_engines_chunks_arrive_whole() -> None:
    data = b"".join(chat_chunks("漢字😀"))

    outputs = await outputs_of(
        ScriptedApp(body=[bytes([byte]) for byte in data], content_type="text/event-stream"), CHAT
    )

    assert "".join(outputs).encode() == data


async def test_a_streamed_top_level_job_yields_dicts_with_the_new_text() -> None:
    app = ScriptedApp(body=chat_chunks("a", "b", "c"), content_type="text/event-stream", pause_s=0.001)

    outputs = await outputs_of(app, NATIVE)

    assert "".join(output["text"] for output in outputs) == "abc"
    assert outputs[-1]["finish_reason"] == "stop"


async def test_what_is_not_streamed_is_yielded_once_as_json() -> None:
    answer = {"choices": [{"message": {"content": "漢"}}], "usage": {"n": 1.25}}
    body = json.dumps(answer, ensure_ascii=False).encode()

    assert await outputs_of(ScriptedApp(body=[body[:20], body[20:]]), CHAT) == [answer]


@pytest.mark.parametrize(
    ("content_type", "body", "output"),
    [("application/json", b"", ""), ("text/plain; charset=utf-8", "é".encode(), "é"), ("application/json", b"[]", [])],
)
async def test_other_bodies_are_outputs_too(content_type: str, body: bytes, output: Any) -> None:
    assert await outputs_of(ScriptedApp(body=[body], content_type=content_type), CHAT) == [output]


async def test_a_body_that_no_output_can_hold_is_an_error_that_says_so() -> None:
    app = ScriptedApp(body=[b"RIFF\xff"], content_type="audio/wav")

    assert "audio/wav" in error_of(await outputs_of(app, CHAT))["error"]["message"]


async def test_a_refusal_keeps_its_status_type_code_and_message() -> None:
    app = ScriptedApp(body=[json.dumps(REFUSAL).encode()], status=404)

    assert error_of(await outputs_of(app, CHAT)) == {**REFUSAL, "status": 404, "retryable": False}


async def test_a_status_without_a_name_is_passed_on() -> None:
    document = error_of(await outputs_of(ScriptedApp(body=[b""], status=499), CHAT))

    assert (document["status"], document["error"]["type"]) == (499, "Status 499")


async def test_an_answer_with_an_error_in_it_is_an_answer() -> None:
    """VLLM's responses have the field, and so may documents of other routes."""
    answer = {"object": "response", "status": "incomplete", "error": {"code": "x", "message": "cut"}}

    assert await outputs_of(ScriptedApp(body=[json.dumps(answer).encode()]), CHAT) == [answer]


@pytest.mark.parametrize("body", [b"Bad gateway", b"[]", b'"x"', b"", b'{"detail":"No"}', b"{}"])
async def test_a_refusal_without_an_error_body_gets_one(body: bytes) -> None:
    document = error_of(await outputs_of(ScriptedApp(body=[body], status=502, content_type="text/plain"), CHAT))

    assert document["status"] == document["error"]["code"] == 502
    assert document["error"]["message"]
    assert document["retryable"] is True


async def test_an_input_that_is_not_accepted_does_not_reach_the_engine() -> None:
    app = ScriptedApp()

    document = error_of(await outputs_of(app, {"text": "hi"}))

    assert (document["status"], document["error"]["type"]) == (400, "BadRequestError")
    assert app.requests == []


async def test_an_engine_that_breaks_off_ends_the_job_as_retryable_and_keeps_what_came() -> None:
    chunks = chat_chunks("a")[:2]
    app = ScriptedApp(body=chunks, content_type="text/event-stream", fails=True)

    outputs = await outputs_of(app, CHAT)

    assert "".join(outputs[:-1]).encode() == b"".join(chunks)
    assert error_of(outputs)["retryable"] is True


async def test_an_engine_that_cannot_be_had_ends_the_job_with_a_readable_error() -> None:
    class Broken(ScriptedApp):
        async def app(self) -> App:
            raise RuntimeError("secret detail")

    outputs = await outputs_of(Broken(), CHAT)

    assert error_of(outputs)["status"] == 500
    assert "secret" not in str(outputs)


async def test_an_error_event_in_a_top_level_stream_fails_the_job() -> None:
    app = ScriptedApp(body=[*chat_chunks("a")[:2], *sse(REFUSAL)], content_type="text/event-stream", pause_s=0.001)

    outputs = await outputs_of(app, NATIVE)

    assert outputs[0]["text"] == "a"
    assert error_of(outputs)["error"] == REFUSAL["error"]


async def test_the_engine_has_let_go_when_the_error_is_yielded() -> None:
    """The SDK asks for nothing more after an error, and does not close the generator."""
    app = ScriptedApp(
        body=[*chat_chunks("a")[:2], *sse(REFUSAL), b"x" * 9], content_type="text/event-stream", pause_s=0.01
    )
    before = asyncio.all_tasks()

    async for output in pipeline.run({"id": "1", "input": NATIVE}, app):
        if "error" in output:
            assert asyncio.all_tasks() == before
            assert app.disconnects == 1


async def test_a_consumer_that_goes_away_is_a_disconnect() -> None:
    app = ScriptedApp(body=chat_chunks(*"abcdefgh"), content_type="text/event-stream", pause_s=0.01)
    outputs = pipeline.run({"id": "1", "input": CHAT}, app)

    await anext(outputs)
    await outputs.aclose()

    assert app.disconnects == 1


async def test_a_consumer_that_is_cancelled_while_it_delivers_is_a_disconnect() -> None:
    """The stock loop does not close the generator then; here it is even kept."""
    app = ScriptedApp(body=chat_chunks(*"abcdefgh"), content_type="text/event-stream", pause_s=0.01)
    kept = []
    delivering = asyncio.Event()

    async def handler() -> AsyncGenerator[Any, None]:
        outputs = pipeline.run({"id": "1", "input": CHAT}, app)
        async with pipeline.aclosing_on_task_exit(outputs):
            async for output in outputs:
                yield output

    async def consume() -> None:
        kept.append(handler())
        async for _ in kept[0]:
            delivering.set()
            await asyncio.Event().wait()

    consumer = asyncio.ensure_future(consume())
    await delivering.wait()
    consumer.cancel()
    await asyncio.wait({consumer})
    async with asyncio.timeout(10):
        await app.left.wait()
    await kept[0].aclose()


async def test_a_slow_consumer_gets_what_has_gathered_in_one_output() -> None:
    app = ScriptedApp(body=chat_chunks(*"abcdefgh"), content_type="text/event-stream", pause_s=0.001)
    outputs = []

    async for output in pipeline.run({"id": "1", "input": CHAT}, app):
        outputs.append(output)
        await app.ended.wait()

    assert len(outputs) == 2


async def test_batches_keep_their_interval_but_the_first_and_the_end_do_not_wait() -> None:
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
async def test_a_stream_that_ends_in_an_error_event_is_a_failed_job_and_its_client_sees_the_error_once(
    route: str, ends_with: list[dict[str, Any]], error: dict[str, Any]
) -> None:
    first = {"type": "response.created", "response": {"error": None}, "text": 'he said "error"'}
    body = [*sse(first, *ends_with), b"data: [DONE]\n\n"]
    app = ScriptedApp(body=body, content_type="text/event-stream", pause_s=0.05)

    outputs = await outputs_of(app, {"openai_route": route, "openai_input": {"stream": True}})

    assert "".join(outputs[:-1]).encode() == b"".join(body)
    assert error_of(outputs) == {"error": error, "status": 500, "retryable": False}


@pytest.mark.parametrize(("status", "retryable"), [(400, False), (429, True), (500, False), (501, False), (503, True)])
async def test_another_try_is_offered_only_where_it_can_help(status: int, retryable: bool) -> None:
    app = ScriptedApp(body=[json.dumps(ERROR).encode()], status=status)

    assert error_of(await outputs_of(app, CHAT))["retryable"] is retryable


async def test_a_large_event_of_a_top_level_job_comes_whole() -> None:
    """As with `echo` and log-probabilities of a long prompt."""
    text = "x" * 2_500_000
    app = ScriptedApp(body=chat_chunks("a", text, "b"), content_type="text/event-stream", pause_s=0.01)

    outputs = await outputs_of(app, NATIVE)

    assert "".join(output["text"] for output in outputs) == f"a{text}b"


async def test_an_answer_to_a_top_level_job_has_what_langchain_reads_beside_vllms() -> None:
    answer = {
        "choices": [
            {"index": 0, "message": {"content": "hi"}},
            {"index": 1, "text": "ho"},
            {"message": {"content": None}},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    app = ScriptedApp(body=[json.dumps(answer).encode()])

    (native,) = await outputs_of(app, {"prompt": "x"})
    (openai,) = await outputs_of(app, {"openai_input": {"messages": []}})

    assert [choice.pop("tokens") for choice in native["choices"]] == [["hi"], ["ho"], [""]]
    assert (native["usage"].pop("input"), native["usage"].pop("output")) == (3, 2)
    assert native == openai == answer


async def test_what_was_ignored_of_a_top_level_job_stands_in_its_answer() -> None:
    app = ScriptedApp(body=[b'{"choices": []}'])

    (answer,) = await outputs_of(app, {"prompt": "x", "batch_size": 5})

    assert answer == {"choices": [], "warnings": [IGNORED]}


@pytest.mark.parametrize("value", [{"prompt": "x"}, {"openai_input": {"messages": []}}], ids=["native", "openai"])
async def test_what_was_ignored_of_any_job_is_logged_with_its_id(
    value: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    await outputs_of(ScriptedApp(), {**value, "batch_size": 5})

    assert caplog.messages == [f"Job job-1: {IGNORED}"]


async def test_an_event_above_the_cap_of_a_top_level_stream_comes_in_pieces() -> None:
    text = "x" * 2_500_000
    app = ScriptedApp(body=chat_chunks(text), content_type="text/event-stream")

    outputs = await outputs_of(app, NATIVE)

    assert len(outputs) > 2
    assert max(len(json.dumps({"output": output})) for output in outputs) <= 1_000_000
    assert "".join(output["text"] for output in outputs) == text


async def test_a_route_that_vllm_does_not_have_is_not_found() -> None:
    app = ScriptedApp(unknown=frozenset({"/v1/v1/chat/completions"}))

    document = error_of(await outputs_of(app, {"openai_route": "/v1/v1/chat/completions"}))

    assert (document["status"], document["error"]["type"]) == (404, "NotFoundError")
    assert app.requests == []
