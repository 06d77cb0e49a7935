"""Batches of events: in whatever chunks a stream arrives, its outputs are complete events within the size limit."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.errors import InternalError
from engine.jobs.event_batcher import EventBatcher

# Text that is hard to split and to escape: characters of one to four bytes, joiners, controls, both line endings.
AWKWARD = st.text(
    st.sampled_from('aé漢😀👩\u200d\r\n"\\\x00\x1f\x7f\u2028:') | st.characters(exclude_categories=["Cs"])
)
ENDS = ("\n\n", "\r\n\r\n")
LINES = AWKWARD.map(lambda text: "data: " + text.replace("\r", "").replace("\n", ""))
EVENTS = st.lists(st.tuples(LINES, st.sampled_from(ENDS)).map("".join))


@st.composite
def split_streams(draw: st.DrawFn, text: st.SearchStrategy[str]) -> list[bytes]:
    """Draw a stream as bytes, split anywhere, empty chunks included."""
    data = draw(text).encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=20)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def outputs_of(chunks: list[bytes], max_bytes: int = 1_000_000) -> list[str]:
    batcher = EventBatcher(max_bytes)
    return [output for chunk in chunks for output in batcher.feed(chunk)] + batcher.finish()


@given(split_streams(AWKWARD | EVENTS.map("".join)))
@example([b"data: \xe6\xbc", b"\xa2\n", b"\n"])
def test_the_outputs_together_are_the_stream(chunks: list[bytes]) -> None:
    assert "".join(outputs_of(chunks)).encode() == b"".join(chunks)


@given(split_streams(EVENTS.map("".join)))
def test_every_output_ends_at_the_end_of_an_event(chunks: list[bytes]) -> None:
    assert all(output.endswith(ENDS) for output in outputs_of(chunks))


@given(split_streams(AWKWARD | EVENTS.map("".join)), st.integers(20, 200))
def test_every_output_is_within_the_limit_as_it_is_posted(chunks: list[bytes], max_bytes: int) -> None:
    outputs = outputs_of(chunks, max_bytes)

    posted = [json.dumps({"output": output}, ensure_ascii=False).encode() for output in outputs]
    assert all(len(body) <= max_bytes for body in posted)
    assert "".join(outputs).encode() == b"".join(chunks)


@given(EVENTS.filter(bool), st.integers(40, 400))
def test_only_an_event_above_the_limit_is_split(events: list[str], max_bytes: int) -> None:
    room = max_bytes - len('{"output": ""}')
    small = [event for event in events if len(json.dumps(event, ensure_ascii=False).encode()) - 2 <= room]

    outputs = outputs_of(["".join(small).encode()], max_bytes)

    assert all(output.endswith(ENDS) for output in outputs)


@given(EVENTS.filter(bool))
def test_an_event_is_returned_with_its_last_byte(events: list[str]) -> None:
    batcher = EventBatcher()
    for event in events:
        assert batcher.feed(event.encode()[:-1]) == []
        assert batcher.feed(event.encode()[-1:]) == [event]


@given(split_streams(EVENTS.map("".join)), st.sampled_from([b"\xff", b"\xe6\xbc", b"\xed\xa0\x80"]))
def test_invalid_utf8_is_an_error_after_the_complete_events(chunks: list[bytes], garbage: bytes) -> None:
    batcher = EventBatcher()
    complete = "".join(output for chunk in chunks for output in batcher.feed(chunk))

    assert complete.encode() == b"".join(chunks)
    with pytest.raises(InternalError, match="not UTF-8"):
        batcher.feed(b"data: " + garbage + b"\n\n")


def test_an_event_of_many_megabytes_is_split_without_loss() -> None:
    event = "data: " + '漢"\n\x01' * 500_000 + "\n\n"

    outputs = outputs_of([event.encode()])

    assert "".join(outputs) == event
    assert all(len(json.dumps({"output": output}, ensure_ascii=False).encode()) <= 1_000_000 for output in outputs)


def test_a_limit_too_small_for_one_character_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        EventBatcher(15)
