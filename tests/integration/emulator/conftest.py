"""Emulators with real workers: the stock SDK with a trivial handler."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from emulator.app import Emulator, run_in_thread
from emulator.cli import with_default_worker
from emulator.settings import EmulatorSettings
from tests.processes import BUSY_ENVIRONMENT

KEY = "a-key-of-the-tests"
LLM_START_S = 240.0
REPOSITORY = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("openai_worker.py")
T = TypeVar("T")


def eventually(poll: Callable[[], T], timeout_s: float = 60.0, interval_s: float = 0.02) -> T:
    """Return the first true value of `poll`; fail the test after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not (value := poll()):
        if time.monotonic() > deadline:
            pytest.fail(f"condition not met within {timeout_s} s")
        time.sleep(interval_s)
    return value


class Site:
    """HTTP clients of an emulator with one endpoint, `ep`."""

    def __init__(self, url: str, stack: ExitStack, ca_file: Path | None = None) -> None:
        self.url, self.ca_file = url, ca_file
        headers = {"Authorization": f"Bearer {KEY}"}
        verify = ssl.create_default_context(cafile=ca_file) if ca_file else True

        def client(base_url: str) -> httpx.Client:
            return stack.enter_context(httpx.Client(base_url=base_url, headers=headers, timeout=60, verify=verify))

        self.root, self.client = client(url), client(f"{url}/v2/ep")

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v2/ep/openai/v1"

    def submit(self, job_input: Any, **fields: Any) -> str:
        job_id: str = self.client.post("/run", json={"input": job_input, **fields}).raise_for_status().json()["id"]
        return job_id

    def status(self, job_id: str) -> dict[str, Any]:
        document: dict[str, Any] = self.client.get(f"/status/{job_id}").raise_for_status().json()
        return document

    def ended(self, job_id: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """Wait until the job has ended; return its status."""

        def poll() -> dict[str, Any] | None:
            status = self.status(job_id)
            return None if status["status"] in ("IN_QUEUE", "IN_PROGRESS") else status

        return eventually(poll, timeout_s) or {}

    def health(self) -> dict[str, Any]:
        document: dict[str, Any] = self.client.get("/health").raise_for_status().json()
        return document

    def state(self) -> dict[str, Any]:
        """Return the endpoint's part of /state."""
        endpoint: dict[str, Any] = self.root.get("/state").raise_for_status().json()["endpoints"][0]
        return endpoint

    def idle_workers(self, count: int, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """Wait until exactly this many workers are idle; return them."""

        def poll() -> list[dict[str, Any]]:
            workers = [worker for worker in self.state()["workers"] if worker["state"] == "idle"]
            return workers if len(workers) == count else []

        return eventually(poll, timeout_s)

    def freeze(self, worker: str, *, drops_connections: bool = True) -> None:
        """Freeze a worker with all its processes, until `thaw`."""
        options = {"dropConnections": drops_connections}
        self.root.post(f"/workers/{worker}/freeze", json=options).raise_for_status()

    def thaw(self, worker: str) -> None:
        self.root.post(f"/workers/{worker}/thaw").raise_for_status()

    def log_of(self, worker: str) -> list[str]:
        """Return the last lines that a worker, running or exited, has logged."""
        state = self.state()
        return [line for one in state["workers"] + state["gone"] if one["id"] == worker for line in one["log"]]

    def faults(self, *rules: dict[str, Any], **settings: Any) -> None:
        self.root.put("/faults", json={"rules": rules, **settings}).raise_for_status()


Start = Callable[..., Site]


def settings_with(*, tls: bool = False, **endpoint: Any) -> EmulatorSettings:
    """Return settings with one endpoint `ep`, which runs `openai_worker.py` by default."""
    defaults = {"id": "ep", "command": [sys.executable, str(WORKER)], "workersMax": 1, "scalerType": "REQUEST_COUNT"}
    document = {"port": 0, "tls": tls, "apiKeys": [KEY], "endpoints": [{**defaults, **endpoint}]}
    return EmulatorSettings.model_validate(document)


@contextmanager
def site_with(*, tls: bool = False, events: list[str] | None = None, **endpoint: Any) -> Iterator[Site]:
    """Run an emulator during the block; `events` gets all lines of its timeline."""

    def event_log(_: str, line: str) -> None:
        if events is not None:
            events.append(line)

    with ExitStack() as stack:
        emulator: Emulator = stack.enter_context(run_in_thread(settings_with(tls=tls, **endpoint), event_log))
        yield Site(emulator.url, stack, emulator.ca_file)


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts an emulator with these settings of its endpoint."""
    with ExitStack() as stack:
        yield lambda **endpoint: stack.enter_context(site_with(**endpoint))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """An emulator for a module's tests, with a ready worker that runs up to four jobs.

    `grace` is short since the stock loop exits only after its last long poll.
    """
    with site_with(workersMin=1, grace=2, env={"CONCURRENCY": "4", "PAUSE_S": "0.02"}) as running:
        running.idle_workers(1)
        yield running


class CommandLine:
    """A running `python -m emulator`, ready for requests."""

    def __init__(self, process: subprocess.Popen[str], stack: ExitStack) -> None:
        self.process = process
        self.lines: list[str] = []
        url = self._line_with(" listens on ").rpartition(" ")[2]
        self.ca_file = Path(self._line_with("--cacert").split()[-2]) if url.startswith("https:") else None
        self.site = Site(url, stack, self.ca_file)

    def _line_with(self, text: str) -> str:
        while not self.lines or text not in self.lines[-1]:
            line = self.process.stdout.readline() if self.process.stdout else ""
            if not line:
                pytest.fail(f"the emulator did not start: {self.lines}")
            self.lines.append(line.rstrip())
        return self.lines[-1]


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[Callable[..., CommandLine]]:
    """Return a function that starts `python -m emulator` with these options and variables."""
    with ExitStack() as stack:

        def begin(*options: str, **variables: str) -> CommandLine:
            log = stack.enter_context((tmp_path / "stderr").open("w"))
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "emulator", "--port", "0", "--endpoint", "ep", "--api-key", KEY, *options],
                    cwd=REPOSITORY,
                    env={**os.environ, **variables},
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return CommandLine(process, stack)

        yield begin


def _tiny_worker(**variables: str) -> dict[str, Any]:
    """Return an endpoint with the worker of `make up`, always running."""
    return with_default_worker({"env": {**BUSY_ENVIRONMENT, **variables}, "workersMin": 1, "rateLimits": False})


@pytest.fixture(scope="session")
def llm() -> Iterator[Site]:
    """An emulator with this repository's worker and the tiny model, ready."""
    with site_with(**_tiny_worker(ALLOWED_ROUTES="/metrics")) as running:
        running.idle_workers(1, LLM_START_S)
        yield running


@pytest.fixture(scope="session")
def embedder() -> Iterator[Site]:
    """The same with an embedding model."""
    with site_with(**_tiny_worker(RUNNER="pooling", CONVERT="embed")) as running:
        running.idle_workers(1, LLM_START_S)
        yield running


def processes_named_in(path: Path) -> list[int]:
    """Return the process ids in a file that a worker has written."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    """Return whether a process is running; a zombie is not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def pretty(document: object) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False)
