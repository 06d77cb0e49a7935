"""How a worker ends: by SIGTERM, or because its engine is dead; with the real engine and the real SDK."""

from __future__ import annotations

import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from builder.tiny_model.corpus import example
from tests.emulator_queue import EmulatorQueue, emulator_queue
from tests.integration.conftest import START_S
from tests.processes import VLLM_ENVIRONMENT, Process, running

ENDLESS = {"prompt": "January,", "sampling_params": {"max_tokens": 1900, "ignore_eos": True}, "stream": True}
END_S = 90.0
GOOD = {"messages": example("ok").messages, "sampling_params": {"temperature": 0}}


@pytest.fixture
def queue() -> Iterator[EmulatorQueue]:
    with emulator_queue() as queue:
        yield queue


@pytest.fixture
def own_worker(
    queue: EmulatorQueue, tiny_model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Process]:
    """Run a worker that the test ends; the fixture's parameter adds variables to its environment.

    It leaves no socket behind. The stall timeout is long by default: an engine on a busy machine may make no step for
    seconds.
    """
    timeouts = {"DRAIN_TIMEOUT_S": "10", "ENGINE_STALL_TIMEOUT_S": "60", **getattr(request, "param", {})}
    environment = {**VLLM_ENVIRONMENT, **queue.environment, "MODEL_NAME": tiny_model, **timeouts}
    # pytest's own directories have a path that is too long for a socket.
    with (
        tempfile.TemporaryDirectory() as temporary,
        running(["handler.py"], {**environment, "TMPDIR": temporary}, tmp_path / "log") as process,
    ):
        process.wait_for(queue.has_worker, START_S)
        assert sockets_in(temporary)
        yield process
        assert process.popen.poll() is not None
        assert sockets_in(temporary) == []


def sockets_in(directory: str) -> list[Path]:
    return [path for path in Path(directory).rglob("*") if path.is_socket()]


def engine_core(process: Process) -> psutil.Process:
    (core,) = [child for child in process.family() if "EngineCore" in child.name()]
    return core


def test_a_dead_engine_fails_all_jobs_as_retryable_and_ends_the_worker(
    queue: EmulatorQueue, own_worker: Process, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [queue.submit(ENDLESS) for _ in range(20)]
    for job in jobs:
        job.first_output()
    family = own_worker.family()

    begun = time.monotonic()
    engine_core(own_worker).send_signal(signal.SIGKILL)
    for job in jobs:
        job.wait()
    late = queue.submit(GOOD)
    status = own_worker.popen.wait(END_S)
    ended_s = time.monotonic() - begun

    assert status == 1
    assert [job.error()["retryable"] for job in jobs] == [True] * 20
    assert late.status()["status"] == "IN_QUEUE", late.status()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    with capsys.disabled():
        print(f"\nengine core killed amid 20 jobs: the worker has ended after {ended_s:.1f} s")  # noqa: T201


@pytest.mark.parametrize("own_worker", [{"ENGINE_STALL_TIMEOUT_S": "4"}], indirect=True)
def test_a_stalled_engine_fails_all_jobs_as_retryable_and_ends_the_worker(
    queue: EmulatorQueue, own_worker: Process
) -> None:
    jobs = [queue.submit(ENDLESS) for _ in range(3)]
    for job in jobs:
        job.first_output()
    family = own_worker.family()

    engine_core(own_worker).send_signal(signal.SIGSTOP)

    assert own_worker.popen.wait(END_S) == 1
    for job in jobs:
        job.wait()
    assert [(job.error()["status"], job.error()["retryable"]) for job in jobs] == [(503, True)] * 3
    stall = re.search(r"The worker has failed: no step for (\d+) s while 3 requests run", own_worker.log)
    assert stall is not None
    assert int(stall[1]) >= 4
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def test_after_sigterm_short_jobs_complete_and_long_ones_fail_as_retryable(
    queue: EmulatorQueue, own_worker: Process
) -> None:
    # 1900 steps of a full engine, and 45: the one exceeds the drain timeout by far, the other needs a part of it.
    long = queue.submit({**ENDLESS, "sampling_params": {**ENDLESS["sampling_params"], "n": 64}})  # type: ignore[dict-item]
    long.first_output()
    short = queue.submit(
        {"messages": example("primes").messages, "sampling_params": {"temperature": 0}, "stream": True}
    )
    short.first_output()
    family = own_worker.family()

    own_worker.popen.send_signal(signal.SIGTERM)

    assert own_worker.popen.wait(END_S) == 0
    assert "".join(output["text"] for output in short.wait()) == example("primes").answer
    error = long.error()
    assert (error["status"], error["retryable"]) == (503, True)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def test_the_start_and_the_end_of_a_job_are_logged_in_one_line_each(worker: Process, job_queue: EmulatorQueue) -> None:
    job = job_queue.run({**GOOD, "stream": True})
    worker.wait_for(lambda: worker.log.count(f'"job": "{job.id}"') == 2)  # the second comes after the result

    start, end = re.findall(rf'.*"job": "{job.id}".*', worker.log)
    assert start.endswith('"route": "native", "status": "started"}')
    assert '"status": "completed", "tokens_in": 22, "tokens_out": 3' in end


def test_a_start_without_enough_memory_reports_the_length_that_would_fit(tiny_model: str, tmp_path: Path) -> None:
    secrets = {"HF_TOKEN": "hf_notarealtoken", "VLLM_API_KEY": "notarealkey", "API_KEY": "notarealkey"}
    environment = {"HF_HUB_OFFLINE": "1", "MODEL_NAME": tiny_model, "KV_CACHE_MEMORY_BYTES": "1M", **secrets}
    with running(["handler.py"], environment, tmp_path / "log") as process:
        assert process.popen.wait(START_S) == 1

        assert process.log.splitlines()[-1] == (
            "The worker cannot start: not enough memory for MAX_MODEL_LEN: set it to 384 or less"
        )
        assert "notareal" not in process.log
