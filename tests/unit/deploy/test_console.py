"""What the user sees: no secret, and the phases as a bar or as lines."""

from __future__ import annotations

import io
import os

from deploy.console import Console, Progress, table
from deploy.environment import Redaction
from tests.unit.deploy.conftest import Terminal
from tests.unit.deploy.fakes import KEY


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_no_secret_is_written(terminal: Terminal) -> None:
    terminal.console.log(f"refused: Bearer {KEY}")
    terminal.console.result(f"the key is {KEY}")

    assert terminal.messages == "deploy: refused: Bearer ***\n"
    assert terminal.result == "the key is ***\n"


def test_phases_are_lines_with_the_time_that_has_passed(terminal: Terminal) -> None:
    now = 100.0
    progress = Progress(terminal.console, ("worker", "image", "start"), terminal.err, lambda: now)
    now = 103.0
    progress.reach("image", "pulling")
    now = 103.5
    progress.reach("worker")
    progress.reach("start")
    now = 104.0
    progress.end()

    assert terminal.messages == "deploy:    3.0 s  image: pulling\ndeploy:    3.5 s  start\n"
    assert progress.durations_s == {"worker": 3.0, "image": 0.5, "start": 0.5}


def test_phases_are_a_bar_on_a_terminal() -> None:
    screen = Screen()
    console = Console(Redaction([KEY]), io.StringIO(), screen)
    progress = console.progress(("worker", "image", "first token"))
    progress.reach("image", f"pulling with {KEY}")
    progress.end()

    shown = screen.getvalue()
    assert "image" in shown
    assert "1/3" in shown
    assert KEY not in shown
    assert "\n" not in shown, "the bar leaves no line behind"


def test_further_lines_of_a_text_are_indented() -> None:
    assert table({"A": "1\n2", "Bcd": "3"}) == "A    1\n     2\nBcd  3"


def test_what_stdout_cannot_encode_is_escaped() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    Console(Redaction(), out, io.StringIO()).result("grün \ud800")

    assert out.buffer.getvalue() == b"gr\\xfcn \\ud800\n"


def test_an_answer_does_not_control_the_terminal(terminal: Terminal) -> None:
    terminal.console.result("\x1b[31mred\x1b[0m\x1b]0;title\x07\tand\r 40 %\x08\nmore")

    assert terminal.result == "red\tand 40 %\nmore\n"


def test_a_terminal_without_a_width_gets_lines() -> None:
    """A pseudo-terminal whose maker has not set its size, as in CI: a bar would show nothing there."""
    leader, follower = os.openpty()
    with os.fdopen(leader, "rb", buffering=0) as reader, os.fdopen(follower, "w", encoding="utf-8") as screen:
        progress = Console(Redaction(), io.StringIO(), screen).progress(("worker", "image"))
        progress.reach("image")
        progress.end()

        assert b"s  image\r\n" in reader.read(100)
