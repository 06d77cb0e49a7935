"""The systems under test, as context managers: vLLM alone, this worker and worker-vllm, each with its stock settings.

Each of the two workers runs under its own instance of the emulator. All systems have the same model and the same KV
cache size, and run without compilation. They run at the same time and are measured one after another.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from bench.clients import Address

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
    """A system did not start; the message includes its last log line if there is one."""


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
            raise StartError(_last_line(state["gone"][0]["log"]))
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
        ready_s: how long its start took.
    """

    name: str
    address: Address
    process: psutil.Process
    platform: EmulatedPlatform | None
    ready_s: float

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


def vllm_flags(*, gpu: bool) -> dict[str, str]:
    """Return the vLLM flags that all systems get.

    On a GPU, three engines must fit into its memory at the same time. On a CPU they compute in float32: a CPU without
    bfloat16 instructions emulates it, and an engine that is seven times slower hides the cost of everything else.
    """
    common = {"served-model-name": "tiny", "enforce-eager": "true"}
    return common | ({"gpu-memory-utilization": "0.25"} if gpu else {"dtype": "float32"})


@contextmanager
def vllm_server(
    model: Path, logs: Path, *, gpu: bool, flags: Mapping[str, str] | None = None
) -> Iterator[SystemUnderTest]:
    """Run vLLM's own server, which gets its requests directly.

    Raises:
        StartError: it did not start.
    """
    port = free_port()
    given = vllm_flags(gpu=gpu) | {"model": str(model), "host": "127.0.0.1", "port": str(port)} | dict(flags or {})
    options = ["--enforce-eager" if name == "enforce-eager" else f"--{name}={value}" for name, value in given.items()]
    options.append("--disable-uvicorn-access-log")
    arguments = ["-m", "vllm.entrypoints.openai.api_server", *options]
    start_s = time.monotonic()
    with run_process(VLLM, arguments, logs) as process:
        _wait_until_ready(lambda: _check_health(port), process, VLLM)
        yield SystemUnderTest(
            VLLM,
            Address(port, f"/v1{_ROUTE}"),
            psutil.Process(process.pid),
            platform=None,
            ready_s=time.monotonic() - start_s,
        )


@contextmanager
def this_worker(
    model: Path, logs: Path, *, gpu: bool, extra: Mapping[str, str] | None = None
) -> Iterator[SystemUnderTest]:
    """Run this repository's worker under the emulator, with `extra` environment variables.

    Raises:
        StartError: it did not start.
    """
    variables = [f"--env={name}={value}" for name, value in (extra or {}).items()]
    with _worker(OURS, [*worker_options(model, gpu=gpu), *variables], logs) as system:
        yield system


@contextmanager
def peer_worker(model: Path, logs: Path, *, gpu: bool, checkout: Path) -> Iterator[SystemUnderTest]:
    """Run worker-vllm under the emulator, with its own defaults (which include at most 30 concurrent jobs).

    Raises:
        StartError: it did not start.
    """
    with (
        peer_options(model, logs, gpu=gpu, checkout=checkout) as options,
        _worker(PEER, options, logs) as system,
    ):
        yield system


def worker_options(model: Path, *, gpu: bool) -> list[str]:
    """Return the emulator's options for a worker with this model."""
    return [f"--env={name}={value}" for name, value in worker_variables(model, gpu=gpu).items()]


def worker_variables(model: Path, *, gpu: bool) -> dict[str, str]:
    """Return the environment variables of a worker with this model."""
    flags = {name.replace("-", "_").upper(): value for name, value in vllm_flags(gpu=gpu).items()}
    return {"MODEL_NAME": str(model), **flags}


@contextmanager
def peer_options(model: Path, directory: Path, *, gpu: bool, checkout: Path) -> Iterator[list[str]]:
    """Yield the emulator's options for worker-vllm; the `vllm` command that it needs exists within the block."""
    path = directory.resolve() / "bin"
    path.mkdir(parents=True, exist_ok=True)
    command = path / "vllm"
    command.write_text(_VLLM_COMMAND.format(python=shlex.quote(sys.executable)), encoding="utf-8")
    command.chmod(0o755)
    yield [
        *worker_options(model, gpu=gpu),
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

        yield EmulatedPlatform(_wait_until_ready(port, process, name)), process


@contextmanager
def _worker(name: str, options: list[str], logs: Path) -> Iterator[SystemUnderTest]:
    start_s = time.monotonic()
    with emulator(name, ["--workers-min=1", *options], logs) as (platform, process):
        worker = _wait_until_ready(platform.worker, process, name)
        yield SystemUnderTest(
            name,
            platform.address,
            psutil.Process(worker["pid"]),
            platform=platform,
            ready_s=time.monotonic() - start_s,
        )


def _wait_until_ready(probe: Callable[[], _T], process: subprocess.Popen[bytes], name: str) -> _T:
    """Call `probe` until it raises no `LookupError`, `OSError` or `HTTPException`; return its result.

    Raises:
        StartError: the process or its worker has exited, or the start timed out.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise StartError(f"{name} did not start: exit code {process.returncode}")
        try:
            return probe()
        except StartError as error:
            raise StartError(f"{name} did not start: {error}") from None
        except (LookupError, OSError, http.client.HTTPException):
            if time.monotonic() > deadline:
                raise StartError(f"{name} did not start within {START_TIMEOUT_S:.0f} s") from None
        time.sleep(0.1)


def tiny_model() -> Path:
    """Return the tiny model's directory; it is trained first if it is not in the cache.

    The builder runs in its own process because training imports torch: the pages that this process maps would stay in
    memory when a cold start drops the file cache.
    """
    command = [sys.executable, "-m", "builder", "tiny"]
    return Path(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout.strip())


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def run_process(
    name: str, arguments: list[str], logs: Path, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python process that ends with the block, together with all processes that it has started.

    Args:
        name: of its log file.
        arguments: of the interpreter.
        logs: directory of the log file.
        variables: environment variables, in addition to this process's.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with _log_file(logs, name).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT, **(variables or {})},
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
