"""The command line runs one job on this machine, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from builder.tiny_model.corpus import example
from tests.processes import ROOT, Process, running

START_S = 240.0


@contextmanager
def worker(*arguments: str, log: Path) -> Iterator[Process]:
    with running(["handler.py", *arguments], {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}, log) as process:
        yield process


def test_the_answer_to_test_input_json_is_a_program_that_runs(tiny_model: str) -> None:
    del tiny_model  # It exists now, so only its cache is used here.

    done = subprocess.run([sys.executable, "handler.py"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    program, document, figures = done.stdout.rsplit("\n", 3)[:3]
    assert program == example("python-game").answer.removesuffix("\n")
    job = json.loads(document)
    assert job["status"] == "COMPLETED"
    assert "".join(output["text"] for output in job["output"]) == example("python-game").answer
    assert "tokens/s" in figures
    assert "tiny model, as MODEL_NAME is not set" in done.stderr
    played = subprocess.run([sys.executable, "-c", program], input="7\n", capture_output=True, text=True, check=False)
    assert (played.returncode, played.stderr) == (0, "")
    assert played.stdout


def test_a_first_job_with_one_token_completes(tiny_model: str) -> None:
    """On a CPU with AMX such a job crashed the engine: its kernels had not requested permission to use AMX."""
    test_input = json.dumps({"input": {"route": "/pooling", "body": {"input": "one", "task": "embed"}}})
    variables = {"MODEL_NAME": tiny_model, "RUNNER": "pooling", "CONVERT": "embed"}

    done = subprocess.run(
        [sys.executable, "handler.py", "--test_input", test_input],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout


def test_a_failed_job_is_reported_and_the_exit_status_is_one(tiny_model: str) -> None:
    test_input = json.dumps({"input": {"openai_route": "/v1/completions", "openai_input": {"model": "gpt-5"}}})

    done = subprocess.run(
        [sys.executable, "handler.py", "--test_input", test_input],
        cwd=ROOT,
        env={**os.environ, "MODEL_NAME": tiny_model},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    job = json.loads(done.stdout.splitlines()[-2])
    assert job["status"] == "FAILED"
    assert json.loads(job["error"])["status"] in (400, 404)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_during_the_start_leaves_no_process_behind(
    number: signal.Signals, tiny_model: str, tmp_path: Path
) -> None:
    del tiny_model
    with worker(log=tmp_path / "log") as process:
        process.wait_for(lambda: len(process.family()) > 1, START_S)
        family = process.family()

        process.popen.send_signal(number)

        gone, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
        assert len(gone) == len(family)
