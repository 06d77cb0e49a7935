"""A worker whose engine has several processes: many starts, none of which may hang."""

from __future__ import annotations

import signal
import statistics
import time
from pathlib import Path

import pytest

from builder.tiny_model.corpus import example
from tests.integration.emulator.conftest import alive, eventually
from tests.integration.test_processes import END_S, GREEDY, on_two_cores
from tests.job_queue import serving
from tests.processes import running
from tests.soak.conftest import Show

STARTS = 20
START_S = 120.0
TOOK_S: list[float] = []


@pytest.mark.parametrize("number", range(STARTS))
def test_no_start_with_tensor_parallelism_hangs(number: int, tiny_model: str, tmp_path: Path, show: Show) -> None:
    """From exec to the answer; told to stop and killed in turns, a worker leaves no process behind."""
    with serving() as queue:
        job = queue.submit({"messages": example("ok").messages, "sampling_params": GREEDY, "stream": True})
        begun = time.monotonic()
        environment = on_two_cores(queue, tiny_model, TENSOR_PARALLEL_SIZE="2")
        with running(["handler.py"], environment, tmp_path / "log") as process:
            process.wait_for(lambda: job.status()["status"] == "COMPLETED", START_S)
            TOOK_S.append(time.monotonic() - begun)
            assert "".join(output["text"] for output in job.wait()) == example("ok").answer
            family = [member.pid for member in process.family()]

            process.popen.send_signal(signal.SIGKILL if number % 2 else signal.SIGTERM)

            process.popen.wait(END_S)
            eventually(lambda: not any(map(alive, family)))
    if number == STARTS - 1:
        show(f"{len(TOOK_S)} starts with two workers: p50 {statistics.median(TOOK_S):.1f} s, max {max(TOOK_S):.1f} s")
