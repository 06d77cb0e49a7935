"""The command line without an engine, and the imports of the handler in a spawned process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_spawned_process_does_not_import_the_heavy_packages() -> None:
    """Processes that vLLM spawns import the main module again. Importing vLLM takes 7.5 s, the SDK 1.9 s."""
    loaded = run("-c", "import sys, handler; print(*sys.modules)").stdout.split()

    heavy = {"vllm", "torch", "transformers", "runpod", "pydantic", "fastapi", "aiohttp", "numpy"}
    assert "handler" in loaded
    assert heavy.isdisjoint(loaded)


def test_an_invalid_setting_aborts_the_start_with_one_line() -> None:
    done = run("handler.py", MAX_CONCURRENCY="lots")

    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("The worker cannot start: MAX_CONCURRENCY='lots' is not allowed.")


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_malformed_test_input_is_refused_before_the_engine_loads(text: str) -> None:
    done = run("handler.py", "--test_input", text)

    assert done.returncode == 1
    assert "test input" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_the_worker_without_a_traceback(number: signal.Signals) -> None:
    environment = {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/job-take/$ID?x=1", "MODEL_NAME": "/nowhere"}
    with subprocess.Popen(
        [sys.executable, "handler.py"], cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    ) as process:
        status = Path(f"/proc/{process.pid}/status")
        # Wait until its last signal handler is installed. It then imports for seconds.
        while not int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) >> (signal.SIGTERM - 1) & 1:
            assert process.poll() is None
            time.sleep(0.01)

        process.send_signal(number)

        _, errors = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_an_unknown_option_is_an_error() -> None:
    done = run("handler.py", "--tset_input", "{}")

    assert done.returncode == 2
    assert "--tset_input" in done.stderr


@pytest.mark.parametrize(
    "platform",
    [
        {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/job-take/$ID?x=1"},
        {"PLATFORM": "spirit", "EASE_AGENT_URL": "http://127.0.0.1:9"},
    ],
)
def test_without_a_model_a_worker_on_a_platform_exits_with_an_error(platform: dict[str, str]) -> None:
    done = run(
        "handler.py",
        **platform,
        MODEL_NAME="",
        BAKED_MODEL_DIR="/nowhere",
    )

    assert done.returncode == 1
    assert "set MODEL_NAME" in done.stderr


def test_the_job_in_test_input_json_is_accepted() -> None:
    from engine.jobs.inputs import parse

    assert parse(json.loads((ROOT / "test_input.json").read_text()), 2048).path == "/v1/chat/completions"
