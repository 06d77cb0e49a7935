"""Streams of top-level jobs: events in, dicts with the new text out."""

from __future__ import annotations

import pytest

from engine import native
from engine.errors import RefusedError
from tests.scripted import chat_chunks, sse


def batch(*chunks: list[bytes]) -> str:
    return b"".join(b"".join(part) for part in chunks).decode()


def test_the_texts_of_a_batch_become_one() -> None:
    assert native.deltas(batch(chat_chunks("漢", "字"))) == [{"index": 0, "text": "漢字", "finish_reason": "stop"}]


def test_line_separators_within_a_text_do_not_end_its_event() -> None:
    text = "a\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r\nb"

    assert native.deltas(batch(chat_chunks(text)))[0]["text"] == text


def test_completions_have_their_text_too() -> None:
    events = sse({"choices": [{"index": 0, "text": "a", "finish_reason": None}]})

    assert native.deltas(batch(events)) == [{"index": 0, "text": "a", "finish_reason": None}]


def test_each_choice_has_a_dict_of_its_own_in_order() -> None:
    events = sse(*({"choices": [{"index": index, "text": str(index)}]} for index in (1, 0, 1)))

    assert [(delta["index"], delta["text"]) for delta in native.deltas(batch(events))] == [(0, "0"), (1, "11")]


def test_usage_comes_with_the_last_dict() -> None:
    events = sse({"choices": [{"index": 0, "text": "a"}]}, {"choices": [], "usage": {"completion_tokens": 1}})

    assert native.deltas(batch(events))[-1]["usage"] == {"completion_tokens": 1}


def test_usage_alone_still_comes() -> None:
    events = sse({"choices": [], "usage": {"completion_tokens": 1}})

    assert native.deltas(batch(events)) == [
        {"index": 0, "text": "", "finish_reason": None, "usage": {"completion_tokens": 1}}
    ]


def test_a_batch_without_news_gives_nothing() -> None:
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}

    assert native.deltas(batch(sse(role))) == []


def test_reasoning_tool_calls_and_logprobs_are_kept() -> None:
    first = {"index": 0, "delta": {"reasoning": "so ", "tool_calls": [{"index": 0, "id": "a"}]}, "logprobs": {"t": 1}}
    second = {"index": 0, "delta": {"reasoning": "then", "tool_calls": [{"index": 0}]}, "logprobs": {"t": 2}}

    (delta,) = native.deltas(batch(sse({"choices": [first]}, {"choices": [second]})))

    assert delta["reasoning"] == "so then"
    assert delta["tool_calls"] == [{"index": 0, "id": "a"}, {"index": 0}]
    assert delta["logprobs"] == [{"t": 1}, {"t": 2}]


def test_an_error_event_ends_the_job_with_the_engines_own_error() -> None:
    error = {"error": {"message": "no", "type": "BadRequestError", "param": None, "code": 400}}

    with pytest.raises(RefusedError) as caught:
        native.deltas(batch(sse(error)))

    assert caught.value.document() == {**error, "status": 400, "retryable": False}


def test_comments_that_keep_a_connection_alive_are_no_events() -> None:
    assert list(native.events(": keep-alive\n\ndata: [DONE]\n\n")) == []
