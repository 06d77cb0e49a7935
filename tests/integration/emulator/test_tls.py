"""`python -m emulator --tls`: a client and a worker connect, and no file is left."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.emulator.conftest import WORKER, CommandLine

Begin = Callable[..., CommandLine]


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_it_prints_the_ca_file_and_deletes_it_at_shutdown(
    command_line: Begin, tmp_path: Path, stop_signal: signal.Signals
) -> None:
    emulator = command_line("--command", "true", "--workers-max", "0", "--tls", TMPDIR=str(tmp_path))
    assert emulator.site.url.startswith("https://127.0.0.1:")
    curl = emulator.lines[-1].partition(": ")[2]
    page = subprocess.run([*shlex.split(curl), "--silent"], capture_output=True, text=True, check=True).stdout
    assert "<title>" in page
    assert emulator.ca_file is not None
    directory = emulator.ca_file.parent
    assert directory.parent == tmp_path
    assert directory.stat().st_mode & 0o777 == 0o700
    emulator.process.send_signal(stop_signal)
    assert emulator.process.wait(20) == 0
    assert not directory.exists()


def test_a_worker_takes_pings_and_finishes_a_job_over_tls(command_line: Begin, tmp_path: Path) -> None:
    """Only pings, which the SDK sends with `requests`, keep a job without outputs for longer than `lostAfter`."""
    options = ["--workers-min", "1", "--ping-interval", "1000", "--lost-after", "2.5", "--max-retries", "0"]
    command = f"{sys.executable} {WORKER}"
    site = command_line("--command", command, "--tls", *options, TMPDIR=str(tmp_path)).site
    site.idle_workers(1)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "sleep 4"}]}
    job_id = site.submit({"openai_route": "/v1/chat/completions", "openai_input": chat})
    status = site.ended(job_id)
    assert (status["status"], status.get("retries", 0)) == ("COMPLETED", 0)
