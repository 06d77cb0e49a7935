"""Fixtures of the integration tests: one tiny model, one queue, one worker and one vLLM server, each started once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from emulator.free_port import free_port
from tests.emulator_queue import EmulatorQueue, emulator_queue
from tests.integration import schedule
from tests.processes import BUSY_ENVIRONMENT, OTHER_CORE, ROOT, VLLM_ENVIRONMENT, Process, running

START_S = 240.0
STAND_INS = ROOT / "tests" / "stand_ins"

# vLLM's flags, in the worker's form. They allow all kinds of requests and do not change the answers of others. With
# reasoning in plain words and structured outputs within it, a request can force any answer.
FLAGS = {
    "ENABLE_AUTO_TOOL_CHOICE": "true",
    "TOOL_CALL_PARSER": "hermes",
    "REASONING_PARSER": "granite",
    "STRUCTURED_OUTPUTS_CONFIG": '{"enable_in_reasoning": true}',
    "ENABLE_TOKENIZER_INFO_ENDPOINT": "true",
    # Earlier requests must not change an answer, not even the last bit of a log-probability.
    "ENABLE_PREFIX_CACHING": "false",
}


def pytest_configure() -> None:
    """Set what all processes that tests start inherit.

    The processes of tests (pytest-xdist) are distributed over the cores: vLLM binds all engines to the first one.
    """
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[int(worker.removeprefix("gw")) % len(cores)])
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*paths, str(STAND_INS)]))


@pytest.fixture(scope="session")
def tiny_model() -> str:
    """Return the directory of the tiny model; the first run on a machine trains it."""
    made = subprocess.run([sys.executable, "-m", "builder", "tiny"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return made.stdout.decode().strip()


@pytest.fixture(scope="session")
def job_queue() -> Iterator[EmulatorQueue]:
    with emulator_queue() as queue:
        yield queue


@pytest.fixture(scope="session")
def worker(job_queue: EmulatorQueue, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Run `python handler.py` on the queue, with the real SDK and the real engine, ready for jobs."""
    environment = {
        **BUSY_ENVIRONMENT,
        **FLAGS,
        **job_queue.environment,
        "MODEL_NAME": tiny_model,
        "SERVED_MODEL_NAME": "tiny",
        "HF_TOKEN": "hf_notarealtoken",
        "ALLOWED_ROUTES": "/metrics",
    }
    with running(["handler.py"], environment, tmp_path_factory.mktemp("worker") / "log") as process:
        process.wait_for(job_queue.has_worker, START_S)
        yield process


@pytest.fixture(scope="session")
def vllm_server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Run vLLM's own server on the same model; yield a client of it."""
    port = free_port()
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}", "--enforce-eager"]
    arguments += [f"--model={tiny_model}", "--served-model-name", "tiny"]
    for name, value in FLAGS.items():
        flag = name.lower().replace("_", "-")
        arguments += {"true": [f"--{flag}"], "false": [f"--no-{flag}"]}.get(value, [f"--{flag}", value])
    log = tmp_path_factory.mktemp("vllm") / "log"
    with (
        running(arguments, VLLM_ENVIRONMENT | OTHER_CORE, log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        process.wait_for(lambda: _answers(client), START_S)
        yield client


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> schedule.Schedule | None:
    """Give out files as `tests.integration.schedule` says, where files are given out (`--dist loadfile`)."""
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return schedule.Schedule(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files, and allow time for the start of an engine and the training of the model, which any test may cause."""
    items.sort(key=lambda item: schedule.place(item.path))
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(2 * START_S + 120))
