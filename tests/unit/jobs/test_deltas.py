"""Streams of top-level jobs: batches of events become dicts with the new text."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import EngineResponseError
from engine.jobs import deltas
from engine.jobs.event_batcher import MAX_OUTPUT_BYTES
from engine.json_codec import encode
from tests.scripted import chat_chunks, sse


def batch(*chunks: list[bytes]) -> str:
    return b"".join(b"".join(part) for part in chunks).decode()


def test_the_texts_of_a_batch_are_joined() -> None:
    assert list(deltas.from_events(batch(chat_chunks("漢", "字")))) == [
        {"index": 0, "text": "漢字", "finish_reason": "stop"}
    ]


def test_line_separators_in_a_text_do_not_end_its_event() -> None:
    text = "a\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r\nb"

    assert next(deltas.from_events(batch(chat_chunks(text))))["text"] == text


def test_a_completion_event_becomes_a_dict_with_its_text() -> None:
    events = sse({"choices": [{"index": 0, "text": "a", "finish_reason": None}]})

    assert list(deltas.from_events(batch(events))) == [{"index": 0, "text": "a", "finish_reason": None}]


def test_each_choice_has_its_own_dict_in_order_of_index() -> None:
    events = sse(*({"choices": [{"index": index, "text": str(index)}]} for index in (1, 0, 1)))

    assert [(delta["index"], delta["text"]) for delta in deltas.from_events(batch(events))] == [(0, "0"), (1, "11")]


def test_usage_is_in_the_last_dict() -> None:
    events = sse({"choices": [{"index": 0, "text": "a"}]}, {"choices": [], "usage": {"completion_tokens": 1}})

    assert list(deltas.from_events(batch(events)))[-1]["usage"] == {"completion_tokens": 1}


def test_usage_without_text_has_a_dict() -> None:
    events = sse({"choices": [], "usage": {"completion_tokens": 1}})

    assert list(deltas.from_events(batch(events))) == [
        {"index": 0, "text": "", "finish_reason": None, "usage": {"completion_tokens": 1}}
    ]


def test_a_batch_without_text_has_no_dict() -> None:
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}

    assert list(deltas.from_events(batch(sse(role)))) == []


def test_reasoning_and_tool_calls_are_kept() -> None:
    first = {"index": 0, "delta": {"reasoning": "so ", "tool_calls": [{"index": 0, "id": "a"}]}}
    second = {"index": 0, "delta": {"reasoning": "then", "tool_calls": [{"index": 0}]}}

    (delta,) = deltas.from_events(batch(sse({"choices": [first]}, {"choices": [second]})))

    assert delta["reasoning"] == "so then"
    assert delta["tool_calls"] == [{"index": 0, "id": "a"}, {"index": 0}]


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [
        (
            {"content": [{"token": "a"}], "refusal": None},
            {"content": [{"token": "b"}, {"token": "c"}]},
            {"content": [{"token": "a"}, {"token": "b"}, {"token": "c"}], "refusal": None},
        ),
        (
            {"tokens": ["a"], "token_logprobs": [-0.5], "text_offset": [0], "top_logprobs": [None]},
            {"tokens": ["b"], "token_logprobs": [-1.5], "text_offset": [1], "top_logprobs": [{"b": -1.5}]},
            {
                "tokens": ["a", "b"],
                "token_logprobs": [-0.5, -1.5],
                "text_offset": [0, 1],
                "top_logprobs": [None, {"b": -1.5}],
            },
        ),
    ],
    ids=["chat", "completion"],
)
def test_logprobs_of_a_batch_are_joined_in_openais_format(first: Any, second: Any, joined: Any) -> None:
    choices = [{"index": 0, "delta": {"content": "x"}, "logprobs": one} for one in (first, None, second)]

    (delta,) = deltas.from_events(batch(sse(*({"choices": [choice]} for choice in choices))))

    assert delta["logprobs"] == joined


def test_token_ids_and_the_stop_reason_are_kept() -> None:
    first = {"index": 0, "text": "a", "token_ids": [1], "stop_reason": None}
    second = {"index": 0, "text": "b", "token_ids": [2, 3], "stop_reason": 0, "finish_reason": "stop"}

    (delta,) = deltas.from_events(batch(sse({"choices": [first]}, {"choices": [second]})))

    assert delta == {"index": 0, "text": "ab", "finish_reason": "stop", "token_ids": [1, 2, 3], "stop_reason": 0}


def test_the_text_before_an_error_event_is_yielded_first() -> None:
    parsed = deltas.from_events(batch(sse({"choices": [{"index": 0, "text": "a"}]}, {"error": {"message": "no"}})))

    assert next(parsed)["text"] == "a"
    with pytest.raises(EngineResponseError):
        next(parsed)


def test_an_error_event_is_raised_with_vllms_error_body() -> None:
    error = {"error": {"message": "no", "type": "BadRequestError", "param": None, "code": 400}}

    with pytest.raises(EngineResponseError) as caught:
        list(deltas.from_events(batch(sse(error))))

    assert caught.value.document() == {**error, "status": 400, "retryable": False}


def test_keep_alive_comments_are_not_events() -> None:
    assert list(deltas.events(": keep-alive\n\ndata: [DONE]\n\n")) == []


def test_a_failed_response_without_a_reason_has_an_error() -> None:
    failed = deltas.error_in('event: response.failed\ndata: {"type": "response.failed", "response": {}}\n\n')

    assert failed is not None
    assert failed.document()["error"]["message"] == "vLLM reported that the response failed, without a reason"


LARGE: dict[str, Any] = {
    "text": {"text": "漢\x1f" * 400_000},
    "reasoning": {"reasoning": "x" * 2_500_000, "text": "y"},
    "log-probabilities": {
        "text": "a" * 3000,
        "logprobs": {"content": [{"token": "a", "bytes": [97] * 300}] * 3000, "refusal": None},
        "token_ids": list(range(3000)),
    },
    "tool calls": {"tool_calls": [{"index": 1, "id": "c", "function": {"name": "f", "arguments": "z" * 1_500_000}}]},
}


@pytest.mark.parametrize("large", LARGE.values(), ids=LARGE)
def test_a_dict_above_the_output_limit_is_split_without_loss(large: dict[str, Any]) -> None:
    delta: Any = {"index": 2, "text": "", "finish_reason": "stop", "stop_reason": "x", "usage": {"t": 1}, **large}

    parts: list[Any] = list(deltas.split(delta, MAX_OUTPUT_BYTES))

    assert len(parts) > 1
    assert all(len(encode({"output": part})) <= MAX_OUTPUT_BYTES for part in parts)
    assert "".join(part["text"] for part in parts) == delta["text"]
    assert "".join(part.get("reasoning", "") for part in parts) == delta.get("reasoning", "")
    assert [token for part in parts for token in part.get("token_ids", [])] == delta.get("token_ids", [])
    logprobs = [one for part in parts if "logprobs" in part for one in part["logprobs"]["content"] or []]
    assert logprobs == delta.get("logprobs", {}).get("content", [])
    calls = [call for part in parts for call in part.get("tool_calls", [])]
    assert "".join(call["function"]["arguments"] for call in calls) == "z" * (1_500_000 if calls else 0)
    assert [call["index"] for call in calls] == [1] * len(calls)
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert [part for part in parts if "usage" in part or "stop_reason" in part] == parts[-1:]


def test_a_single_large_logprob_is_not_split() -> None:
    delta: Any = {"index": 0, "text": "", "finish_reason": None, "logprobs": {"content": [{"token": "x" * 2_000_000}]}}

    assert list(deltas.split(delta, MAX_OUTPUT_BYTES)) == [delta]


def test_a_token_is_not_taken_for_a_tool_call() -> None:
    logprobs = {"tokens": ["function"], "top_logprobs": [{"function": -0.1}], "token_logprobs": [-0.1]}
    delta: Any = {"index": 1, "text": "", "finish_reason": "stop", "logprobs": logprobs}

    assert list(deltas.split(delta, 50)) == [delta]
