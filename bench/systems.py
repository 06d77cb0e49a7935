"""The servers under test, as context managers: vLLM alone, this worker and worker-vllm, each of them on stock settings.

The two workers run under an emulator of their own, of the same code. All have the same model, the same KV cache, and no
compilation. They run at the same time and are measured in turn.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from bench.clients import Address

VLLM, OURS, PEER = "vLLM alone", "this worker", "worker-vllm"

ROOT = Path(__file__).parent.parent
START_S = 600.0
_END_S = 60.0
_ROUTE = "/chat/completions"
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
# vLLM's engine core and its workers name themselves so.
_ENGINE_TITLES = ("VLLM::EngineCore", "VLLM::Worker")
# What `vllm serve` is: without the CUDA build's metadata the command cannot start itself.
_VLLM_COMMAND = '#!/bin/sh\n[ "$1" = serve ] && shift\nexec {python} -m vllm.entrypoints.openai.api_server "$@"\n'


_T = TypeVar("_T")


class ServerError(Exception):
    """A server did not start; the message says what it said last."""


class Platform:
    """The control API of an emulator."""

    def __init__(self, port: int) -> None:
        self.port = port

    def state(self) -> dict[str, Any]:
        """What `GET /state` tells of the endpoint."""
        state: dict[str, Any] = self._call("GET", "/state")["endpoints"][0]
        return state

    def set_latency(self, latency_ms: int) -> None:
        """Put the platform so far away from its worker.

        A take is held open, so it is its answer that is late; a delivery is late on its way.
        """
        calls = {"job-take": "after", "job-stream": "before", "job-done": "before"}
        rules = [
            {"kind": "latency", "route": route, "when": when, "latency_ms": latency_ms} for route, when in calls.items()
        ]
        self._call("PUT", "/faults", {"rules": rules if latency_ms else []})

    def worker(self) -> dict[str, Any]:
        """The worker that is ready.

        Raises:
            ServerError: it has ended.
            LookupError: it is not ready yet.
        """
        state = self.state()
        if state["gone"]:
            raise ServerError(_last_line(state["gone"][0]["log"]))
        workers: list[dict[str, Any]] = [worker for worker in state["workers"] if worker["readyAt"] is not None]
        return workers[0]

    def _call(self, method: str, path: str, document: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            body = None if document is None else json.dumps(document)
            connection.request(method, path, body, {"Authorization": "Bearer local"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
            if answer.status != http.HTTPStatus.OK:
                raise RuntimeError(f"{method} {path}: {answer.status} {content}")
            return content
        finally:
            connection.close()


@dataclass
class Server:
    """A server that is ready.

    Args:
        name: one of `VLLM`, `OURS`, `PEER`.
        address: where it answers chats.
        process: vLLM's API server, or the worker that the emulator has started.
        platform: the emulator, for workers.
        ready_s: how long its start took.
    """

    name: str
    address: Address
    process: psutil.Process
    platform: Platform | None
    ready_s: float

    def cpu_s(self) -> float:
        """CPU seconds so far of its processes without vLLM's engine core and the engine's workers.

        For this worker that is the worker and the SDK's ping, for worker-vllm its proxy and `vllm serve`.
        """
        return _cpu_s(process for process in self._family() if not _is_engine(process))

    def all_cpu_s(self) -> float:
        """CPU seconds so far of all its processes."""
        return _cpu_s(self._family())

    def memory_mib(self) -> float:
        """The memory of all its processes: PSS, in which pages that processes share count once."""
        total = 0
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total / 2**20

    def _family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


def _cpu_s(processes: Any) -> float:
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


def flags(*, gpu: bool) -> dict[str, str]:
    """VLLM's flags that all servers are given.

    On a GPU, three engines have to fit beside each other. On a CPU they reckon in float32: bfloat16 is emulated where
    there are no instructions for it, and an engine that takes seven times as long hides what stands before it.
    """
    same = {"served-model-name": "tiny", "enforce-eager": "true"}
    return same | ({"gpu-memory-utilization": "0.25"} if gpu else {"dtype": "float32"})


@contextmanager
def vllm_alone(model: str, logs: Path, *, gpu: bool) -> Iterator[Server]:
    """VLLM's own server, asked directly.

    Raises:
        ServerError: it did not start.
    """
    port = free_port()
    given = flags(gpu=gpu) | {"model": model, "host": "127.0.0.1", "port": str(port)}
    options = ["--enforce-eager" if name == "enforce-eager" else f"--{name}={value}" for name, value in given.items()]
    options.append("--disable-uvicorn-access-log")
    arguments = ["-m", "vllm.entrypoints.openai.api_server", *options]
    begun = time.monotonic()
    with _started(VLLM, arguments, logs) as process:
        until(lambda: _healthy(port), process, VLLM)
        yield Server(
            VLLM,
            Address(port, f"/v1{_ROUTE}"),
            psutil.Process(process.pid),
            platform=None,
            ready_s=time.monotonic() - begun,
        )


@contextmanager
def this_worker(model: str, logs: Path, *, gpu: bool) -> Iterator[Server]:
    """This repository's worker under the emulator.

    Raises:
        ServerError: it did not start.
    """
    with _worker(OURS, worker_options(model, gpu=gpu), logs) as server:
        yield server


@contextmanager
def peer_worker(model: str, logs: Path, *, gpu: bool, checkout: Path) -> Iterator[Server]:
    """worker-vllm under the emulator, with all of its own defaults (30 jobs at once among them).

    Raises:
        ServerError: it did not start.
    """
    with (
        peer_options(model, logs, gpu=gpu, checkout=checkout) as options,
        _worker(PEER, options, logs) as server,
    ):
        yield server


def worker_options(model: str, *, gpu: bool) -> list[str]:
    """The emulator's options for a worker with this model."""
    variables = {"MODEL_NAME": model}
    variables |= {name.replace("-", "_").upper(): value for name, value in flags(gpu=gpu).items()}
    return [f"--env={name}={value}" for name, value in variables.items()]


@contextmanager
def peer_options(model: str, directory: Path, *, gpu: bool, checkout: Path) -> Iterator[list[str]]:
    """The emulator's options for worker-vllm, with a `vllm` command for it while the block lasts."""
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
def emulator(name: str, options: list[str], logs: Path) -> Iterator[tuple[Platform, subprocess.Popen[bytes]]]:
    """An emulator for a worker, ready for requests.

    Raises:
        ServerError: it did not start.
    """
    arguments = ["-m", "emulator", "--port=0", "--quiet", "--no-rate-limits", "--workers-max=1", *options]
    with _started(name, arguments, logs) as process:

        def port() -> int:
            found = re.search(r"listens on http://\S+:(\d+)", _log(logs, name).read_text(encoding="utf-8"))
            if found is None:
                raise LookupError
            return int(found[1])

        yield Platform(until(port, process, name)), process


@contextmanager
def _worker(name: str, options: list[str], logs: Path) -> Iterator[Server]:
    begun = time.monotonic()
    with emulator(name, ["--workers-min=1", *options], logs) as (platform, process):
        worker = until(platform.worker, process, name)
        yield Server(
            name,
            gateway(platform),
            psutil.Process(worker["pid"]),
            platform=platform,
            ready_s=time.monotonic() - begun,
        )


def gateway(platform: Platform) -> Address:
    """Where an emulator's worker answers chats."""
    return Address(platform.port, f"/v2/local/openai/v1{_ROUTE}")


def until(look: Callable[[], _T], process: subprocess.Popen[bytes], name: str, limit_s: float = START_S) -> _T:
    """What `look` returns, as soon as it raises no `LookupError` or `OSError` any more.

    Raises:
        ServerError: the process has ended, its worker has, or it took too long.
    """
    deadline = time.monotonic() + limit_s
    while True:
        if process.poll() is not None:
            raise ServerError(f"{name} did not start: exit code {process.returncode}")
        try:
            return look()
        except ServerError as error:
            raise ServerError(f"{name} did not start: {error}") from None
        except (LookupError, OSError, http.client.HTTPException):
            if time.monotonic() > deadline:
                raise ServerError(f"{name} did not start within {limit_s:.0f} s") from None
        time.sleep(0.1)


def tiny_model() -> str:
    """The directory of the tiny model, trained first where it is not there yet."""
    command = [sys.executable, "-m", "builder", "tiny"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout.strip()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def environment() -> Mapping[str, str]:
    """What servers find in their environment: ours, quiet and with the same KV cache for each."""
    return {**os.environ, **_ENVIRONMENT}


@contextmanager
def _started(name: str, arguments: list[str], logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, and all that it has started with it."""
    logs.mkdir(parents=True, exist_ok=True)
    with _log(logs, name).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        for left in (process, *family):
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


def _log(logs: Path, name: str) -> Path:
    return logs / f"{name.replace(' ', '-')}.log"


def _healthy(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        if connection.getresponse().status != http.HTTPStatus.OK:
            raise LookupError
    finally:
        connection.close()


def _last_line(lines: list[str]) -> str:
    told = [line.strip() for line in lines if line.strip()]
    return told[-1] if told else "it said nothing"
