"""Cursors and lines of workers' logs."""

from __future__ import annotations

import pytest

from emulator.control_plane.logs import MAX_LINES, Cursor, WorkerLogs, format_time, parse_time
from tests.unit.emulator.fakes import FakeClock


def logs_with(clock: FakeClock, *lines: str) -> WorkerLogs:
    """Return logs with lines of the worker `w`, a second apart; those that begin with `host` are the system's."""
    logs = WorkerLogs(clock)
    for line in lines:
        clock.now += 1
        logs.add("w", "system" if line.startswith("host") else "container", line)
    return logs


def texts(logs: WorkerLogs, cursor: Cursor) -> list[str]:
    return [line.text for line in logs.read("w", cursor, None)]


def test_an_event_has_its_time_and_number_as_id() -> None:
    clock = FakeClock()
    (line,) = logs_with(clock, "hello").read("w", Cursor(), None)
    assert line.event() == (
        "id: 1970-01-01T00:16:41.000Z/000000000001\n"
        'data: {"ts": "1970-01-01T00:16:41.000Z", "source": "container", "line": "hello"}\n\n'
    )


def test_tail_is_the_last_lines_of_the_source() -> None:
    logs = logs_with(FakeClock(), "host 1", "a", "host 2", "b")
    assert texts(logs, Cursor(tail=0)) == []
    assert texts(logs, Cursor(tail=3)) == ["a", "host 2", "b"]
    assert [line.text for line in logs.read("w", Cursor(tail=1), "system")] == ["host 2"]
    assert texts(logs, Cursor(tail=99)) == ["host 1", "a", "host 2", "b"]


def test_a_stream_resumes_after_an_event_or_from_a_time() -> None:
    logs = logs_with(FakeClock(), "a", "b", "c")
    resumed = Cursor.of_event_id("1970-01-01T00:16:42.000Z/000000000002")
    assert resumed is not None
    assert texts(logs, resumed) == ["c"]
    bare = Cursor.of_event_id("1970-01-01T00:16:42Z")
    assert bare is not None
    assert texts(logs, bare) == ["b", "c"]


def test_a_shown_time_finds_its_line_although_it_was_rounded() -> None:
    clock = FakeClock()
    clock.now = 1000.0004
    logs = logs_with(clock, "a")
    shown = parse_time(format_time(clock.now))
    assert shown is not None
    assert texts(logs, Cursor(at=shown)) == ["a"]


@pytest.mark.parametrize("event_id", ["", "42", "a/1", "1970-01-01T00:16:42Z/", "1970-01-01T00:16:42Z/x", "1970-01-01"])
def test_what_is_no_id_of_an_event_is_no_cursor(event_id: str) -> None:
    assert Cursor.of_event_id(event_id) is None


def test_lines_and_workers_are_kept_up_to_a_limit() -> None:
    logs = logs_with(FakeClock(), *(str(number) for number in range(MAX_LINES + 2)))
    assert texts(logs, Cursor())[0] == "2"
    for number in range(60):
        logs.add(f"w{number}", "system", "hello")
    assert not logs.has("w")
    assert logs.has("w59")
