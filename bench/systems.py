"""The systems under test, as context managers: vLLM alone, this worker and worker-vllm, each with its stock settings.

Each of the two workers runs under its own instance of the emulator. All systems have the same model, the same flags of
vLLM and so the same KV cache size. They run at the same time and are measured one after another.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from bench.clients import Address
from emulator.free_port import free_port

VLLM, OURS, PEER = "vLLM alone", "this worker", "worker-vllm"

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 60.0
_ROUTE = "/chat/completions"
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
# The process titles of vLLM's engine core and its workers.
_ENGINE_TITLES = ("VLLM::EngineCore", "VLLM::Worker")
# A replacement for the `vllm` command, which does not start without the metadata of the CUDA build.
_VLLM_COMMAND = '#!/bin/sh\n[ "$1" = serve ] && shift\nexec {python} -m vllm.entrypoints.openai.api_server "$@"\n'

_T = TypeVar("_T")


class StartError(Exception):
    """A system did not start; the message includes its last log line if there is one.

    Args:
        message: what happened.
        log: the last lines that the system logged.
    """

    def __init__(self, message: str, log: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Setup:
    """What all systems get.

    Args:
        model: the model's directory; it is served as `tiny`.
        flags: vLLM's flags by name, without the dashes.
        environment: further environment variables.
        start_timeout_s: how long a start may take.
    """

    model: Path
    flags: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = START_TIMEOUT_S


class EmulatedPlatform:
    """A client for one emulator's control API."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def address(self) -> Address:
        """Where the emulator's worker serves chat completions."""
        return Address(self.port, f"/v2/local/openai/v1{_ROUTE}")

    def state(self) -> dict[str, Any]:
        """Return the endpoint's state from `GET /state`."""
        state: dict[str, Any] = self._call("GET", "/state")["endpoints"][0]
        return state

    def set_latency(self, latency_ms: int) -> None:
        """Set the latency between the platform and its worker; 0 removes it.

        A take is a long poll, so its response is delayed; deliveries are delayed on their way to the platform.
        """
        calls = {"job-take": "after", "job-stream": "before", "job-done": "before"}
        rules = [
            {"kind": "latency", "route": route, "when": when, "latency_ms": latency_ms} for route, when in calls.items()
        ]
        self._call("PUT", "/faults", {"rules": rules if latency_ms else []})

    def worker(self) -> dict[str, Any]:
        """Return the worker that is ready.

        Raises:
            StartError: the worker has exited.
            LookupError: no worker is ready yet.
        """
        state = self.state()
        if state["gone"]:
            log = state["gone"][0]["log"]
            raise StartError(_last_line(log), log)
        workers: list[dict[str, Any]] = [worker for worker in state["workers"] if worker["readyAt"] is not None]
        return workers[0]

    def _call(self, method: str, path: str, document: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            body = None if document is None else json.dumps(document)
            connection.request(method, path, body, {"Authorization": "Bearer local"})
            response = connection.getresponse()
            content = json.loads(response.read())
            if response.status != http.HTTPStatus.OK:
                raise RuntimeError(f"{method} {path}: {response.status} {content}")
            return content
        finally:
            connection.close()


@dataclass
class SystemUnderTest:
    """A system that is ready for requests.

    Args:
        name: one of `VLLM`, `OURS`, `PEER`.
        address: where it serves chat completions.
        process: vLLM's API server, or the worker that the emulator started.
        platform: the emulator; None for vLLM alone.
        ready_s: how long its start took; of a worker, until its first poll for jobs.
    """

    name: str
    address: Address
    process: psutil.Process
    platform: EmulatedPlatform | None
    ready_s: float

    @classmethod
    def of_worker(cls, name: str, platform: EmulatedPlatform) -> SystemUnderTest:
        """Return the worker of an emulator.

        Raises:
            StartError: the worker has exited.
            LookupError: no worker is ready yet.
        """
        worker = platform.worker()
        ready_s = worker["readyAt"] - worker["startedAt"]
        return cls(name, platform.address, psutil.Process(worker["pid"]), platform, ready_s)

    def worker_cpu_s(self) -> float:
        """Return the CPU seconds so far of its processes, without vLLM's engine core and the engine's workers.

        For this worker these are the worker and the SDK's ping; for worker-vllm, its proxy and `vllm serve`.
        """
        return _cpu_s(process for process in self._processes() if not _is_engine(process))

    def total_cpu_s(self) -> float:
        """Return the CPU seconds so far of all its processes."""
        return _cpu_s(self._processes())

    def memory_mib(self) -> float:
        """Return the memory of all its processes as PSS, which counts pages that processes share once."""
        total = 0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total / 2**20

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _cpu_s(processes: Iterable[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _is_engine(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()).startswith(_ENGINE_TITLES)
    return False


def stock_setup(model: Path, *, gpu: bool) -> Setup:
    """Return what all systems get, unless they are measured with a GPU's own sizes (`bench/gpu.py`): no compilation.

    On a GPU, three engines must fit into its memory at the same time. On a CPU they compute in float32: a CPU without
    bfloat16 instructions emulates it, and an engine that is seven times slower hides the cost of everything else.
    """
    common = {"served-model-name": "tiny", "enforce-eager": "true"}
    return Setup(model, common | ({"gpu-memory-utilization": "0.25"} if gpu else {"dtype": "float32"}))


@contextmanager
def vllm_server(setup: Setup, logs: Path) -> Iterator[SystemUnderTest]:
    """Run vLLM's own server, which gets its requests directly.

    Raises:
        StartError: it did not start.
    """
    port = free_port()
    flags = {**setup.flags, "model": str(setup.model), "host": "127.0.0.1", "port": str(port)}
    options = ["--enforce-eager" if name == "enforce-eager" else f"--{name}={value}" for name, value in flags.items()]
    options.append("--disable-uvicorn-access-log")
    arguments = ["-m", "vllm.entrypoints.openai.api_server", *options]
    start_s = time.monotonic()
    with run_process(VLLM, arguments, logs, setup.environment) as process:
        try:
            _wait_until_ready(lambda: _check_health(port), process, VLLM, setup.start_timeout_s)
        except StartError as error:
            error.log = _log_file(logs, VLLM).read_text(encoding="utf-8", errors="replace").splitlines()
            raise
        yield SystemUnderTest(
            VLLM,
            Address(port, f"/v1{_ROUTE}"),
            psutil.Process(process.pid),
            platform=None,
            ready_s=time.monotonic() - start_s,
        )


@contextmanager
def this_worker(setup: Setup, logs: Path) -> Iterator[SystemUnderTest]:
    """Run this repository's worker under the emulator.

    Raises:
        StartError: it did not start.
    """
    with _worker(OURS, worker_options(setup), logs, setup.start_timeout_s) as system:
        yield system


@contextmanager
def peer_worker(setup: Setup, logs: Path, *, checkout: Path) -> Iterator[SystemUnderTest]:
    """Run worker-vllm under the emulator, with its own defaults (which include at most 30 concurrent jobs).

    Raises:
        StartError: it did not start.
    """
    with (
        peer_options(setup, logs, checkout=checkout) as options,
        _worker(PEER, options, logs, setup.start_timeout_s) as system,
    ):
        yield system


def all_systems(setup: Setup, logs: Path, peer: Path | None) -> list[AbstractContextManager[SystemUnderTest]]:
    """Return all systems, not started: vLLM alone, this worker, and worker-vllm if `peer` is its checkout."""
    result = [vllm_server(setup, logs), this_worker(setup, logs)]
    if peer is not None:
        result.append(peer_worker(setup, logs, checkout=peer))
    return [*result]


def worker_options(setup: Setup) -> list[str]:
    """Return the emulator's options for a worker with this setup."""
    return [f"--env={name}={value}" for name, value in worker_variables(setup).items()]


def worker_variables(setup: Setup) -> dict[str, str]:
    """Return the environment variables of a worker with this setup."""
    flags = {name.replace("-", "_").upper(): value for name, value in setup.flags.items()}
    return {"MODEL_NAME": str(setup.model), **flags, **setup.environment}


@contextmanager
def peer_options(setup: Setup, directory: Path, *, checkout: Path) -> Iterator[list[str]]:
    """Yield the emulator's options for worker-vllm; the `vllm` command that it needs exists within the block."""
    path = directory.resolve() / "bin"
    path.mkdir(parents=True, exist_ok=True)
    command = path / "vllm"
    command.write_text(_VLLM_COMMAND.format(python=shlex.quote(sys.executable)), encoding="utf-8")
    command.chmod(0o755)
    yield [
        *worker_options(setup),
        f"--env=VLLM_PORT={free_port()}",
        f"--env=PATH={path}:{os.environ.get('PATH', os.defpath)}",
        f"--command={shlex.join([sys.executable, str(checkout.resolve() / 'src' / 'main.py')])}",
    ]
    shutil.rmtree(path)


@contextmanager
def emulator(name: str, options: list[str], logs: Path) -> Iterator[tuple[EmulatedPlatform, subprocess.Popen[bytes]]]:
    """Run an emulator for a worker; it accepts requests within the block.

    Raises:
        StartError: it did not start.
    """
    arguments = ["-m", "emulator", "--port=0", "--quiet", "--no-rate-limits", "--workers-max=1", *options]
    with run_process(name, arguments, logs) as process:

        def port() -> int:
            log = _log_file(logs, name).read_text(encoding="utf-8")
            match = re.search(r"listens on http://\S+:(\d+)", log)
            if match is None:
                raise LookupError
            return int(match[1])

        yield EmulatedPlatform(_wait_until_ready(port, process, name, START_TIMEOUT_S)), process


@contextmanager
def _worker(name: str, options: list[str], logs: Path, timeout_s: float) -> Iterator[SystemUnderTest]:
    with emulator(name, ["--workers-min=1", *options], logs) as (platform, process):
        yield _wait_until_ready(lambda: SystemUnderTest.of_worker(name, platform), process, name, timeout_s)


def _wait_until_ready(probe: Callable[[], _T], process: subprocess.Popen[bytes], name: str, timeout_s: float) -> _T:
    """Call `probe` until it raises no `LookupError`, `OSError` or `HTTPException`; return its result.

    Raises:
        StartError: the process or its worker has exited, or the start timed out.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if process.poll() is not None:
            raise StartError(f"{name} did not start: exit code {process.returncode}")
        try:
            return probe()
        except StartError as error:
            raise StartError(f"{name} did not start: {error}", error.log) from None
        except (LookupError, OSError, http.client.HTTPException):
            if time.monotonic() > deadline:
                raise StartError(f"{name} did not start within {timeout_s:.0f} s") from None
        time.sleep(0.1)


def tiny_model() -> Path:
    """Return the tiny model's directory; it is trained first if it is not in the cache.

    The builder runs in its own process because training imports torch: the pages that this process maps would stay in
    memory when a cold start drops the file cache.
    """
    command = [sys.executable, "-m", "builder", "tiny"]
    return Path(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout.strip())


@contextmanager
def run_process(
    name: str, arguments: list[str], logs: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python process that ends with the block, together with all processes that it has started."""
    logs.mkdir(parents=True, exist_ok=True)
    with _log_file(logs, name).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT, **(environment or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        for survivor in (process, *children):
            with suppress(psutil.NoSuchProcess):
                survivor.kill()
        process.wait()


def _log_file(logs: Path, name: str) -> Path:
    return logs / f"{name.replace(' ', '-')}.log"


def _check_health(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        if connection.getresponse().status != http.HTTPStatus.OK:
            raise LookupError
    finally:
        connection.close()


def _last_line(lines: list[str]) -> str:
    nonempty = [line.strip() for line in lines if line.strip()]
    return nonempty[-1] if nonempty else "it logged nothing"
