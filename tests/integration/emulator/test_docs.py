"""Every command and code block in the documents works as written.

The blocks come from `tests.documents`, which also lists those that are not run, and what replaces a reader's account.
One terminal runs the emulator, on the documented port; commands run in another, a shell in this checkout. `make` runs
unchanged: it recreates `.venv` if the lock files are newer.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from engine.backend.routes import SERVING
from tests.documents import ACCOUNT, REPLACED, ROOT, Step, steps, to_run
from tests.integration.test_parity_pooling import with_head
from tests.whisper import transcription_model

START_S = 300.0
STOP_S = 60.0
STEP_S = 150.0
PORT = 8000
STEPS = to_run()
API = [step for step in steps() if step.document == "api.md" and step.language]
_ANY_LINES = r"(?:[^\n]*\n)*?"
_NUMBER = r"\d+\.\d+"
_LOOSE = {"…": r"[^\n]*", "~/.cache": r"\S+"}
_LOOSELY = re.compile(r"(…|~/\.cache|\b\d+\.\d+(?= s\b| tokens/s))")
# A reader's shell does not have these: the `make` that runs the tests sets them, and nested ones print more; and what
# stands for packages in other tests.
NOT_A_READERS = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHONPATH"}
ENVIRONMENT = {**{name: value for name, value in os.environ.items() if name not in NOT_A_READERS}, **ACCOUNT}


def shell_command(command: str, before: str) -> list[str]:
    """Return a shell that runs the preceding commands and then this one."""
    return ["bash", "-e", "-c", before + command]


def pattern_of(shown: str) -> str:
    """Return a regular expression for a documented output.

    `…` matches the rest of a line or, as a line of its own, any lines. Times, rates and home directories may differ.
    """
    lines = []
    for line in shown.splitlines():
        # Parts at odd indices match loosely.
        exact, loose = _LOOSELY.split(line)[::2], _LOOSELY.findall(line)
        parts = zip_longest(map(re.escape, exact), (_LOOSE.get(part, _NUMBER) for part in loose), fillvalue="")
        lines.append(_ANY_LINES if line == "…" else "".join(map("".join, parts)) + "\n")
    return "".join(lines)


class Terminal:
    """A terminal that runs one emulator at a time and stops it with Ctrl-C."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._command = ""

    def start(self, command: str, before: str) -> str:
        """Start this command, unless it is running; return its output once it is ready."""
        if self._process is not None and self._process.poll() is None and self._command == command:
            return self._wait_until_ready()
        self.stop()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", PORT))
            except OSError:
                pytest.fail(f"port {PORT} is taken: `{command}` needs it, as documented; stop the process that uses it")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                shell_command(command, before),
                env=ENVIRONMENT,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self._command = command
        return self._wait_until_ready()

    def stop(self) -> None:
        """Press Ctrl-C, and wait until all its processes have exited."""
        if self._process is None:
            return
        process, self._process = self._process, None
        deadline = time.monotonic() + STOP_S
        try:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(STOP_S)
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        pytest.fail(f"`{self._command}` did not end within {STOP_S} s of Ctrl-C:\n{self._tail()}")

    def _wait_until_ready(self) -> str:
        deadline = time.monotonic() + START_S
        while "OpenAI base URL" not in (printed := self._log.read_text(encoding="utf-8", errors="replace")):
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"`{self._command}` does not listen:\n{self._tail()}")
            time.sleep(0.05)
        return printed

    def _tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-4000:]


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    running = Terminal(tmp_path_factory.mktemp("terminal") / "log")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def classifier_directory(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return with_head(Path(tiny_model), tmp_path_factory.mktemp("classifier") / "model")


@pytest.fixture(scope="module")
def whisper_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return transcription_model(tmp_path_factory.mktemp("whisper"))


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_every_documented_command_works(step: Step, terminal: Terminal, request: pytest.FixtureRequest) -> None:
    printed = ""
    if command := step.runs_on:
        if "=DIR " in command:
            model = "classifier_directory" if "RUNNER=pooling" in command else "whisper_directory"
            command = command.replace("=DIR ", f"={request.getfixturevalue(model)} ")
        printed = terminal.start(command, step.before)
    text = step.text
    for written, replacement in REPLACED.items():
        text = text.replace(written, replacement)

    if step.serves:
        assert re.match(pattern_of(step.shown), printed), printed
    elif step.language == "json":
        check_job(json.loads(text), step)
    elif step.language == "python":
        ran = run(shell_command("python -", step.before), step.setup + text)
        assert ran.stdout.strip() or "print" not in text
    elif step.language in ("console", "sh", ""):
        ran = run(shell_command(step.commands if text == step.text else text, step.before))
        if step.shown:
            assert re.fullmatch(pattern_of(step.shown), ran.stdout), ran.stdout
        if text.startswith("curl "):
            document = json.loads(ran.stdout)
            assert "error" not in document
            assert document.get("status") in (None, "COMPLETED", "completed", "incomplete")
    else:
        pytest.fail(f"{step}: nothing says how a block in {step.language} is run")


def run(command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command that must exit with 0; return its output."""
    ran = subprocess.run(
        command, input=stdin, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=STEP_S, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    return ran


def check_job(document: dict[str, Any], step: Step) -> None:
    """Check a block of JSON: a job's input, or the error of a job for an unknown model."""
    is_error = "error" in document
    job_input = {"messages": [{"role": "user", "content": "Hello!"}], "model": "gpt-5"} if is_error else document
    curl = f"curl -s {'http://127.0.0.1:8000/v2/local'}/runsync -H 'Authorization: Bearer local' -d @-"
    job = json.loads(run(shell_command(curl, step.before), json.dumps({"input": job_input})).stdout)
    if is_error:
        assert json.loads(job["error"]) == document
        return
    assert job["status"] == "COMPLETED", job.get("error")
    assert job["output"]


def test_documented_output_matches_loosely_but_not_arbitrarily() -> None:
    printed = "INFO | in /home/me/.cache/x/1f\nWarning\nReady after 9.6 s\n153 tokens, 200.5 tokens/s\n"
    shown = "INFO | in ~/.cache/…\n…\nReady after 1.2 s\n153 tokens, 1.5 tokens/s\n"

    assert re.fullmatch(pattern_of(shown), printed)
    for wrong in ("153", "Ready", "INFO", "s\n"):
        assert not re.fullmatch(pattern_of(shown.replace(wrong, "wrong")), printed)
    assert not re.fullmatch(pattern_of(shown.replace("…\n…", "…")), printed)


def test_every_allowed_route_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")

    assert [route for route in sorted(SERVING) if f"`{route}`" not in text] == []


def test_every_route_has_a_job_a_curl_and_a_python_example() -> None:
    languages: dict[str, set[str]] = {}
    for step in API:
        languages.setdefault(step.title, set()).add(step.language)

    assert len(languages) >= 9
    wanted = {"json", "sh", "python"}
    assert {title: kinds for title, kinds in languages.items() if kinds - {"console"} != wanted} == {
        "Setup": {"console", "sh", "python"},
        "Errors": {"python"},
        "Many requests: a batch file": {"sh"},
    }
