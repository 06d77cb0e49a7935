"""A worker whose engine has several processes: many starts, none of which may hang; and data parallelism."""

from __future__ import annotations

import re
import signal
import statistics
import time
from pathlib import Path

import pytest

from builder.tiny_corpus import CORPUS, example
from tests.integration.emulator.conftest import alive, eventually
from tests.integration.test_processes import END_S, GREEDY, on_two_cores
from tests.job_queue import serving
from tests.processes import running
from tests.soak.conftest import Show

ENDLESS = {"prompt": "January,", "sampling_params": {"max_tokens": 1900, "ignore_eos": True}, "stream": True}
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


def test_data_parallelism_shares_jobs_among_engines_and_ends_with_any_of_them(tiny_model: str, tmp_path: Path) -> None:
    with serving() as queue:
        environment = on_two_cores(queue, tiny_model, DATA_PARALLEL_SIZE="2", ALLOWED_ROUTES="/metrics")
        with running(["handler.py"], environment, tmp_path / "log") as process:
            process.wait_for(queue.has_worker, START_S)
            chats = [known for known in CORPUS if known.prompt is None][:8]

            jobs = [queue.submit({"messages": it.messages, "sampling_params": GREEDY, "stream": True}) for it in chats]

            assert ["".join(output["text"] for output in job.wait()) for job in jobs] == [it.answer for it in chats]
            (text,) = queue.run({"openai_route": "/metrics"}).wait()
            succeeded = dict(re.findall(r'request_success_total{engine="(\d)",finished_reason="stop",.*} (\S+)', text))
            assert sum(map(float, succeeded.values())) == len(chats)
            assert min(map(float, succeeded.values())) > 0
            assert succeeded.keys() == {"0", "1"}

            long = [queue.submit(ENDLESS) for _ in range(4)]
            for job in long:
                job.first_output()
            family = process.family()
            (second,) = [member for member in family if "EngineCore_DP1" in member.name()]
            second.kill()

            assert process.popen.wait(END_S) == 1
            eventually(lambda: not any(alive(member.pid) for member in family))
