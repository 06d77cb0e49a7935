"""Each line of the log as a JSON object, with `LOG_FORMAT=json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from engine.telemetry.json_lines import record


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("INFO   | Engine ready", {"level": "INFO", "message": "Engine ready"}),
        ('INFO   | {"job": "1", "status": "started"}', {"level": "INFO", "job": "1", "status": "started"}),
        ("ERROR  | job-1 | the SDK's", {"level": "ERROR", "message": "job-1 | the SDK's"}),
        (
            "(EngineCore pid=12) WARNING 11-30 17:45:12 [core.py:100] a step",
            {"level": "WARNING", "message": "a step", "process": "EngineCore pid=12", "source": "core.py:100"},
        ),
        (
            '{"requestId": "1", "message": "m", "level": "WARN"}',
            {"level": "WARN", "message": "m", "requestId": "1"},
        ),
        ('{"time": 5, "level": 30, "message": {"a": 1}, "x": 2}', {"level": "INFO", "x": 2}),
        ("\x1b[31mred\x1b[0m {not json}", {"level": "INFO", "message": "red {not json}"}),
        ("{not json}", {"level": "INFO", "message": "{not json}"}),
    ],
)
def test_a_line_keeps_what_its_writer_says(line: str, expected: dict[str, str]) -> None:
    assert record(line) == expected


PROGRAM = r"""
import os, subprocess, sys
from engine.telemetry import json_lines
json_lines.redirect()
print("INFO   | from Python")
sys.stderr.write("Loading: 50%\rLoading: 100%\n\n")
os.write(1, b"from C\n")
subprocess.run(["echo", "from a child"])
subprocess.Popen(["sleep", "20"])
sys.stderr.write("no newline at the end")
json_lines.finish()
os._exit(3)
"""


def test_all_that_a_process_and_its_children_write_is_json() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=15)

    out = [json.loads(line) for line in done.stdout.splitlines()]
    errors = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 3
    assert sorted(one["message"] for one in out) == ["from C", "from Python", "from a child"]
    assert [one["message"] for one in errors] == ["Loading: 100%", "no newline at the end"]
    assert all(one.keys() == {"time", "level", "message"} for one in out + errors)


HOSTILE = r"""
import os, sys
from engine.telemetry import json_lines
json_lines.redirect()
print('INFO   | {"route": "\\ud800"}')
print('INFO   | {"input": NaN}')
print("INFO   | " + '{"a":' * 100_000 + "1" + "}" * 100_000)
os.write(1, b"\xff\xfe\n")
sys.stdout.write("x" * 3_000_000 + "\n")
print("INFO   | after")
json_lines.finish()
os._exit(3)
"""


def test_what_clients_put_into_a_line_does_not_end_the_filter() -> None:
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, check=False, timeout=15)

    lines = [json.loads(line, parse_constant=pytest.fail) for line in done.stdout.decode().splitlines()]
    assert done.returncode == 3
    assert done.stderr == b""
    assert lines[0]["message"] == 'INFO   | {"route": "\\ud800"}'
    assert lines[1]["message"] == 'INFO   | {"input": NaN}'
    assert lines[3]["message"] == "\N{REPLACEMENT CHARACTER}" * 2
    assert sum(line["message"].count("x") for line in lines[4:-1]) == 3_000_000
    assert lines[-1]["message"] == "after"


WITHOUT_FILTER = r"""
import os, sys, psutil
from engine.telemetry import json_lines
json_lines.redirect()
psutil.Process().children()[0].kill()
json_lines._waiting.join()
print("from Python")
json_lines.finish()
os._exit(3)
"""


def test_lines_are_text_again_if_the_filter_has_died() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_FILTER], capture_output=True, check=False, timeout=15)

    assert (done.returncode, done.stdout, done.stderr) == (3, b"from Python\n", b"")


def test_the_filter_reads_on_if_nobody_reads_its_output() -> None:
    program = PROGRAM.replace('os.write(1, b"from C\\n")', 'os.write(1, b"line\\n" * 100_000)')
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.close()

    assert process.wait(15) == 3


CRASH = r"""
import runpy, sys
from engine import worker
worker.current = lambda *_: 1 / 0
sys.argv = ["handler.py"]
runpy.run_path("handler.py", run_name="__main__")
"""


def test_a_crash_of_the_worker_is_in_the_log() -> None:
    environment = {
        **os.environ,
        "LOG_FORMAT": "json",
        "RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/take",
        "MODEL_NAME": "tiny",
    }
    done = subprocess.run(
        [sys.executable, "-c", CRASH], env=environment, capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == 1
    assert json.loads(done.stderr.splitlines()[-1])["message"] == "ZeroDivisionError: division by zero"
