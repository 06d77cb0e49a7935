"""The comparison of the parity tests finds every difference except how a stream's text is divided into events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.parity import events, joined, plain


def stream(*documents: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(document)}\n\n" for document in documents) + "data: [DONE]\n\n"


def chunk(index: int = 0, *, end: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-0123456789abcdef", "choices": [{"index": index, "delta": delta, "finish_reason": end}]}


def call(arguments: str, **more: Any) -> list[dict[str, Any]]:
    return [{"index": 0, "function": {"arguments": arguments}, **more}]


COMPLETE = [chunk(role="assistant", content=""), chunk(content="Hello"), chunk(content="", end="stop")]


@pytest.mark.parametrize(
    "same",
    [
        [COMPLETE[0], chunk(content="Hel"), chunk(content="lo", reasoning=None), COMPLETE[2]],
        [COMPLETE[0], chunk(content="Hello", end="stop")],
        [{**event, "id": "chatcmpl-fedcba9876543210"} for event in COMPLETE],
    ],
)
def test_streams_with_the_same_content_are_equal(same: list[dict[str, Any]]) -> None:
    assert joined(stream(*same)) == joined(stream(*COMPLETE))


@pytest.mark.parametrize(
    "other",
    [
        COMPLETE[:2],
        COMPLETE[1:],
        [COMPLETE[0], COMPLETE[2]],
        [COMPLETE[0], chunk(content="lo"), chunk(content="Hel"), COMPLETE[2]],
        [COMPLETE[0], chunk(reasoning="Hello"), COMPLETE[2]],
        [*COMPLETE[:2], chunk(content="", end="length")],
        [COMPLETE[0], chunk(1, content="Hello"), COMPLETE[2]],
        [*COMPLETE, {"choices": [], "usage": {}}],
        [{**event, "id": "cmpl-0123456789abcdef"} for event in COMPLETE],
    ],
)
def test_streams_with_other_content_differ(other: list[dict[str, Any]]) -> None:
    assert joined(stream(*other)) != joined(stream(*COMPLETE))


def test_the_order_of_events_of_different_choices_does_not_matter() -> None:
    one, other = chunk(0, content="a"), chunk(1, content="b")

    assert joined(stream(one, other)) == joined(stream(other, one))


def test_arguments_of_a_tool_call_are_joined() -> None:
    parts = [chunk(tool_calls=call("", id="call_1")), chunk(tool_calls=call('{"a":')), chunk(tool_calls=call("1}"))]

    assert joined(stream(*parts)) == joined(stream(chunk(tool_calls=call('{"a":1}', id="call_1"))))
    assert joined(stream(*parts)) != joined(stream(*parts[:2]))


def test_adjacent_typed_events_are_joined_and_their_numbers_ignored() -> None:
    parts = [{"type": "text.delta", "delta": part, "sequence_number": place} for place, part in enumerate("ab")]
    joined_event = {"type": "text.delta", "delta": "ab", "sequence_number": 0}
    between = {"type": "ping", "sequence_number": 1}

    assert joined(stream(*parts)) == joined(stream(joined_event))
    assert joined(stream(parts[0], between, parts[1])) != joined(stream(joined_event, between))


def test_a_stream_that_ends_within_an_event_is_an_error() -> None:
    with pytest.raises(ValueError, match="within an event"):
        events("data: {}\n")


def test_generated_ids_are_reduced_to_their_prefix() -> None:
    document = {"id": "embd-0b9c8d7e-1234-4abc-9def-0123456789ab-u1", "created": 5, "model": "tiny"}

    assert plain(document) == {"id": "embd-", "model": "tiny"}
    assert plain({"id": "tiny", "call_id": "call_1"}) == {"id": "tiny", "call_id": "call_1"}
