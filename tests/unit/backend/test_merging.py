"""Only streams of plain text get events of several tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.backend import merging
from engine.backend.app import Message, Receive, Send
from engine.backend.statistics import Statistics
from engine.backend.stream_interval import StreamInterval
from engine.backend.vllm_engine import VLLMEngine
from engine.jobs import pipeline
from tests.scripted import ScriptedApp, chat_chunks

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PLAIN: dict[str, Any] = {"model": "tiny", "messages": [], "stream": True, "max_tokens": 9, "temperature": 0, "n": 2}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stream_options": {"include_usage": True}},
        {"stream_options": None},
        {"stop": None, "logprobs": None, "tools": [], "echo": False, "logit_bias": None},
    ],
)
def test_a_stream_of_plain_text_may_be_merged(path: str, more: dict[str, Any]) -> None:
    assert merging.is_plain_text(path, PLAIN | more)


@pytest.mark.parametrize(
    "more",
    [
        {"stream": False},
        {"stream": "true"},
        {"tools": [{"type": "function"}]},
        {"logprobs": True},
        {"logprobs": 0},  # The log-probability of each token that a completion has.
        {"top_logprobs": 2},
        {"return_token_ids": True},
        {"stop": "."},
        {"stop": ["."]},
        {"stop_token_ids": [1]},
        {"echo": True},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stream_interval": 3},
        {"a_field_of_a_later_vllm": 1},
    ],
    ids=json.dumps,
)
def test_any_other_stream_is_not_merged(more: dict[str, Any]) -> None:
    assert not merging.is_plain_text(CHAT, PLAIN | more)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/tokenize"])
def test_streams_of_other_routes_are_not_merged(path: str) -> None:
    assert not merging.is_plain_text(path, PLAIN)


@pytest.mark.parametrize(
    ("tokens", "value", "interval"),
    [
        (7, {"openai_input": PLAIN}, 7),
        (7, {"messages": [1], "stream": True}, 7),
        (7, {"prompt": "a", "stream": True}, 7),
        (7, {"openai_input": PLAIN | {"logprobs": True}}, None),
        (7, {"openai_input": PLAIN | {"stream_interval": 2}}, 2),
        (1, {"openai_input": PLAIN}, None),
    ],
)
async def test_a_mergeable_request_sets_stream_interval(
    tokens: int, value: dict[str, Any], interval: int | None
) -> None:
    app = ScriptedApp(chat_chunks("a"), content_type="text/event-stream", tokens=tokens)

    _ = [output async for output in pipeline.run({"id": "1", "input": value}, app)]

    assert json.loads(app.requests[0][1]).get("stream_interval") == interval


@pytest.mark.parametrize(
    ("tokens", "value", "mergeable"),
    [
        (7, {"openai_input": PLAIN}, True),
        (1, {"openai_input": PLAIN}, True),
        (None, {"openai_input": PLAIN}, False),
        (7, {"openai_input": PLAIN | {"logprobs": True}}, False),
        (7, {"openai_input": PLAIN | {"stream": False}}, False),
    ],
)
async def test_the_context_of_a_request_says_whether_its_tokens_may_be_merged(
    tokens: int | None, value: dict[str, Any], *, mergeable: bool
) -> None:
    observed: list[bool] = []

    class RecordingApp(ScriptedApp):
        async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
            observed.append(merging.MERGEABLE.get())
            await super().__call__(scope, receive, send)

    app = RecordingApp(chat_chunks("a"), content_type="text/event-stream", tokens=tokens)

    _ = [output async for output in pipeline.run({"id": "1", "input": value}, app)]

    assert observed == [mergeable]
    assert not merging.MERGEABLE.get()


def engine_with(*, parses_chats: bool = False, user_set_interval: bool = False) -> VLLMEngine:
    engine = object.__new__(VLLMEngine)  # Its constructor would load vLLM.
    engine._parses_chats, engine._stream_interval_is_set = parses_chats, user_set_interval
    engine._interval = StreamInterval(sample_load=lambda: 0.0)
    engine.statistics = Statistics()
    engine.statistics.on_scheduler_stats(0, 64, 0, 0.1)
    engine.statistics.engines[0].step_s = 0.01
    return engine


def test_events_have_more_tokens_when_more_streams_run() -> None:
    assert engine_with().event_tokens(CHAT) == engine_with().event_tokens(COMPLETIONS) == 5  # 50 ms of 10 ms steps


def test_chats_that_a_parser_reads_are_not_merged() -> None:
    assert engine_with(parses_chats=True).event_tokens(CHAT) is None
    assert engine_with(parses_chats=True).event_tokens(COMPLETIONS) == 5


def test_a_stream_interval_that_the_user_has_set_is_kept() -> None:
    assert engine_with(user_set_interval=True).event_tokens(COMPLETIONS) == 1
