"""Many starts of a worker whose engine has several processes; none may hang."""

from __future__ import annotations

import signal
import statistics
import time
from pathlib import Path

import pytest

from builder.tiny_model.corpus import example
from tests.emulator_queue import emulator_queue
from tests.integration.emulator.conftest import alive, eventually
from tests.integration.test_processes import END_S, GREEDY, on_two_cores
from tests.processes import running
from tests.soak.conftest import Show

STARTS = 20
START_S = 120.0
DURATIONS_S: list[float] = []


@pytest.mark.parametrize("number", range(STARTS))
def test_no_start_with_tensor_parallelism_hangs(number: int, tiny_model: str, tmp_path: Path, show: Show) -> None:
    """Measured from exec to the answer. After SIGTERM and SIGKILL alike, no process is left."""
    with emulator_queue() as queue:
        job = queue.submit({"messages": example("ok").messages, "sampling_params": GREEDY, "stream": True})
        begun = time.monotonic()
        environment = on_two_cores(queue, tiny_model, TENSOR_PARALLEL_SIZE="2")
        with running(["handler.py"], environment, tmp_path / "log") as process:
            process.wait_for(lambda: job.status()["status"] == "COMPLETED", START_S)
            DURATIONS_S.append(time.monotonic() - begun)
            assert "".join(output["text"] for output in job.wait()) == example("ok").answer
            family = [member.pid for member in process.family()]

            process.popen.send_signal(signal.SIGKILL if number % 2 else signal.SIGTERM)

            process.popen.wait(END_S)
            eventually(lambda: not any(map(alive, family)))
    if number == STARTS - 1:
        show(
            f"{STARTS} starts with two workers: "
            f"p50 {statistics.median(DURATIONS_S):.1f} s, max {max(DURATIONS_S):.1f} s"
        )
