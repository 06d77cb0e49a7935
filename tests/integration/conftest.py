"""What the integration tests share: one tiny model, one queue, one worker and one vLLM server, each started once."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.job_queue import JobQueue, serving
from tests.processes import OTHER_CORE, ROOT, VLLM_ENVIRONMENT, Process, running

START_S = 240.0

# Flags of vLLM, as the worker takes them: what lets all kinds of requests be compared, and changes no other answer.
# A model that thinks in plain words and a shape that holds in its thoughts too let a model be led to any answer.
FLAGS = {
    "ENABLE_AUTO_TOOL_CHOICE": "true",
    "TOOL_CALL_PARSER": "hermes",
    "REASONING_PARSER": "granite",
    "STRUCTURED_OUTPUTS_CONFIG": '{"enable_in_reasoning": true}',
    "ENABLE_TOKENIZER_INFO_ENDPOINT": "true",
    # What a side has answered before is to change nothing, to the last bit of a log-probability.
    "ENABLE_PREFIX_CACHING": "false",
}


@pytest.fixture(scope="session")
def tiny_model() -> str:
    """Where the tiny model is; trained by the first run on a machine."""
    made = subprocess.run([sys.executable, "-m", "builder", "tiny"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return made.stdout.decode().strip()


@pytest.fixture(scope="session")
def job_queue() -> Iterator[JobQueue]:
    with serving() as queue:
        yield queue


@pytest.fixture(scope="session")
def worker(job_queue: JobQueue, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """`python handler.py` on the queue, with the stock SDK and the real engine, ready for jobs."""
    environment = {
        **VLLM_ENVIRONMENT,
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
def vllm_alone(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """VLLM's own server on the same model: what a request gives without us."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of this folder may be the one that starts an engine, or trains the model."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(2 * START_S + 120))
