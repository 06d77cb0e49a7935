"""The phases of a cold start: they add up to its total, and are logged in one line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from typing import Any

import pytest

from engine.cold_start import ColdStart


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the monotonic clock by one that a test sets."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_phases_add_up_to_the_total(clock: Any) -> None:
    start = ColdStart(started_at=99.0)
    for phase, seconds in (("interpreter", 0.0), ("imports", 6.0), ("app", 0.5)):
        clock.now += seconds
        start.mark(phase)

    assert start.document() == {"total_s": 7.5, "phases_s": {"interpreter": 1.0, "imports": 6.0, "app": 0.5}}


def test_a_phase_that_is_marked_again_or_after_the_end_is_ignored(clock: Any) -> None:
    start = ColdStart(started_at=99.0)
    for phase in ("first_take", "first_take", "first_output", "app"):
        start.mark(phase)
        clock.now += 1.0

    assert start.document() == {"total_s": 3.0, "phases_s": {"first_take": 1.0, "first_output": 2.0}}


def test_phases_that_the_engine_logs_are_split_from_the_engines_phase(clock: Any) -> None:
    start = ColdStart(started_at=clock.now)
    clock.now += 10.0

    start.split_engine_phase({"weights": 3.0, "compile": 4.25})

    assert start.document() == {"total_s": 10.0, "phases_s": {"engine": 2.75, "weights": 3.0, "compile": 4.25}}


def test_phases_that_the_engine_logs_are_limited_to_the_engines_phase(clock: Any) -> None:
    start = ColdStart(started_at=clock.now)
    clock.now += 1.0

    start.split_engine_phase({"weights": 2.5, "compile": 0.0})

    assert start.document() == {"total_s": 1.0, "phases_s": {"engine": 0.0, "weights": 1.0, "compile": 0.0}}


def test_what_a_phase_found_in_its_cache_is_part_of_the_document(clock: Any) -> None:
    start = ColdStart(started_at=clock.now)
    start.mark("compile")

    start.note_cache("compile", "used")

    assert start.document() == {"total_s": 0.0, "phases_s": {"compile": 0.0}, "caches": {"compile": "used"}}


def test_the_phases_are_logged_as_json_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    start = ColdStart()
    start.mark("interpreter")

    with caplog.at_level(logging.INFO):
        start.log("Cold start")

    (record,) = caplog.records
    what, document = record.getMessage().split(" {", 1)
    assert what == "Cold start"
    assert json.loads("{" + document) == start.document()


def test_the_total_includes_the_start_of_the_process() -> None:
    program = (
        "import time; time.sleep(0.5); from engine.cold_start import WORKER as w; w.mark('x'); print(w.document())"
    )

    answer = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, timeout=60)

    document = json.loads(answer.stdout.decode().replace("'", '"'))
    assert 0.5 <= document["total_s"] < 30
