"""The comparison of the parity tests sees what differs, and nothing in how a stream's text was divided."""

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


WHOLE = [chunk(role="assistant", content=""), chunk(content="Hello"), chunk(content="", end="stop")]


@pytest.mark.parametrize(
    "same",
    [
        [WHOLE[0], chunk(content="Hel"), chunk(content="lo", reasoning=None), WHOLE[2]],
        [WHOLE[0], chunk(content="Hello", end="stop")],
        [{**event, "id": "chatcmpl-fedcba9876543210"} for event in WHOLE],
    ],
)
def test_streams_that_say_the_same_are_equal(same: list[dict[str, Any]]) -> None:
    assert joined(stream(*same)) == joined(stream(*WHOLE))


@pytest.mark.parametrize(
    "other",
    [
        WHOLE[:2],
        WHOLE[1:],
        [WHOLE[0], WHOLE[2]],
        [WHOLE[0], chunk(content="lo"), chunk(content="Hel"), WHOLE[2]],
        [WHOLE[0], chunk(reasoning="Hello"), WHOLE[2]],
        [*WHOLE[:2], chunk(content="", end="length")],
        [WHOLE[0], chunk(1, content="Hello"), WHOLE[2]],
        [*WHOLE, {"choices": [], "usage": {}}],
        [{**event, "id": "cmpl-0123456789abcdef"} for event in WHOLE],
    ],
)
def test_streams_that_say_something_else_differ(other: list[dict[str, Any]]) -> None:
    assert joined(stream(*other)) != joined(stream(*WHOLE))


def test_choices_may_take_turns() -> None:
    one, other = chunk(0, content="a"), chunk(1, content="b")

    assert joined(stream(one, other)) == joined(stream(other, one))


def test_arguments_of_a_tool_are_joined() -> None:
    parts = [chunk(tool_calls=call("", id="call_1")), chunk(tool_calls=call('{"a":')), chunk(tool_calls=call("1}"))]

    assert joined(stream(*parts)) == joined(stream(chunk(tool_calls=call('{"a":1}', id="call_1"))))
    assert joined(stream(*parts)) != joined(stream(*parts[:2]))


def test_neighbours_of_typed_events_are_joined_and_unnumbered() -> None:
    parts = [{"type": "text.delta", "delta": part, "sequence_number": place} for place, part in enumerate("ab")]
    whole = {"type": "text.delta", "delta": "ab", "sequence_number": 0}
    between = {"type": "ping", "sequence_number": 1}

    assert joined(stream(*parts)) == joined(stream(whole))
    assert joined(stream(parts[0], between, parts[1])) != joined(stream(whole, between))


def test_a_stream_that_ends_within_an_event_is_none() -> None:
    with pytest.raises(ValueError, match="within an event"):
        events("data: {}\n")


def test_ids_keep_their_prefix_and_other_names_all_of_theirs() -> None:
    made = {"id": "embd-0b9c8d7e-1234-4abc-9def-0123456789ab-u1", "created": 5, "model": "tiny"}

    assert plain(made) == {"id": "embd-", "model": "tiny"}
    assert plain({"id": "tiny", "call_id": "call_1"}) == {"id": "tiny", "call_id": "call_1"}
