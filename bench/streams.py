"""`python -m bench streams`: how text reaches many readers at the pace of a GPU, on a machine without one.

The engine of each system runs with `bench.paced_executor`: its steps take as long as on an H100. vLLM's own server is
called directly and without TLS. This worker delivers over TLS to `bench.queue_server`, which may be some distance away,
and once more to the emulator, whose clients add what a platform adds. All of them run all the time; one gets requests.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import uvloop

from bench import environment, report, systems
from bench.clients import RequestTrace, closed_loop
from bench.metrics import METRICS, Measurement, summarize
from bench.queue_server import QueueServer
from bench.report import print_progress
from bench.scenarios import Scenario
from bench.systems import OURS, ROOT, VLLM, Setup, StartError, SystemUnderTest

EMULATED, BASELINE = "this worker, emulated", "baseline"
BACKEND = "bench.paced_executor.PacedExecutor"
_TOKENS = 128
# What `vllm serve` chooses on an H100; on a CPU it would choose less.
_BATCH = {"max-num-seqs": "1024", "max-num-batched-tokens": "8192"}
_SHOWN = (
    "requests_per_s", "ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "inter_chunk_p50_ms", "inter_chunk_p95_ms",
    "cpu_s_per_1000_tokens", "deliveries_per_token", "errors",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What was measured: so many streams at once, so far from the platform."""

    clients: int
    latency_ms: int


@dataclass
class _System:
    """A system under test and how it gets requests: `send` takes a scenario and a duration in seconds."""

    under_test: SystemUnderTest
    send: Callable[[Scenario, float], Coroutine[Any, Any, list[RequestTrace]]]
    queue: QueueServer | None = None
    measured: dict[Load, list[Measurement]] = field(default_factory=dict)


def add_options(result: argparse.ArgumentParser) -> None:
    """Add the options of this command; `--rounds` and `--out` may also be given before it."""
    result.add_argument(
        "--clients", type=int, nargs="+", default=[1, 8, 64, 256], metavar="N", help="numbers of streams at once"
    )
    result.add_argument(
        "--latency-ms", type=int, nargs="+", default=[0, 20, 40], metavar="MS", help="round trips to the platform"
    )
    result.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of one measurement (default: 5)")
    result.add_argument(
        "--baseline",
        type=_checkout,
        metavar="DIR",
        help="another checkout of this repository, to compare with; it needs bench/paced_executor.py",
    )
    result.add_argument("--rounds", type=int, default=argparse.SUPPRESS, metavar="N", help="rounds (default: 7)")
    result.add_argument(
        "--out",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="directory of streams.json and streams.txt (default: bench-results)",
    )


def _checkout(text: str) -> Path:
    if not (Path(text) / "bench" / "paced_executor.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no checkout of this repository with bench/paced_executor.py")
    return Path(text).resolve()


def run(arguments: argparse.Namespace) -> int:
    """Measure; print and write the results; return the exit code."""
    try:
        return uvloop.run(_run(arguments))
    except StartError as error:
        sys.stderr.write(f"Nothing was measured: {error}\n")
        return 1


async def _run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    stock = systems.stock_setup(systems.tiny_model(), gpu=False)
    setup = replace(stock, flags={**stock.flags, **_BATCH, "distributed-executor-backend": BACKEND})
    conditions = {**environment.hardware(), **environment.versions(None), "rounds": str(arguments.rounds)}
    async with AsyncExitStack() as stack:
        tested = await _start(stack, setup, arguments.baseline, out / "logs")
        for number in range(arguments.rounds):
            for load in (Load(clients, ms) for ms in arguments.latency_ms for clients in arguments.clients):
                for system in tested if number % 2 == 0 else reversed(tested):
                    if system.queue is not None or load.latency_ms == 0:
                        measured = await _measure(system, load, arguments.seconds)
                        system.measured.setdefault(load, []).append(measured)
            print_progress(f"Round {number + 1} of {arguments.rounds} is complete")
            text = "\n".join([*(f"{name}: {value}" for name, value in conditions.items()), "", *table(tested)]) + "\n"
            report.write_text(out / "streams.txt", text)
            report.write_json(out / "streams.json", {"environment": conditions, "measurements": _document(tested)})
    sys.stdout.write(text)
    return 0


async def _start(stack: AsyncExitStack, setup: Setup, baseline: Path | None, logs: Path) -> list[_System]:
    tested = []
    for name, start in ((VLLM, systems.vllm_server), (EMULATED, systems.this_worker)):
        under_test = replace(stack.enter_context(start(setup, logs)), name=name)
        tested.append(_System(under_test, partial(_send_directly, under_test)))
        print_progress(f"{name} is ready")
    for name, root in {OURS: ROOT, BASELINE: baseline}.items():
        if root is not None:
            queue = await stack.enter_async_context(QueueServer())
            arguments = [str(root / "handler.py")]
            started_s = time.monotonic()
            variables = systems.worker_variables(setup) | queue.environment
            process = stack.enter_context(systems.run_process(name, arguments, logs, variables))
            await _wait_for_poll(queue, process, name)
            ready_s = time.monotonic() - started_s
            under_test = SystemUnderTest(name, queue.address, psutil.Process(process.pid), None, ready_s)
            tested.append(_System(under_test, partial(_send_as_jobs, queue), queue))
            print_progress(f"{name} is ready")
    return tested


async def _wait_for_poll(queue: QueueServer, process: subprocess.Popen[bytes], name: str) -> None:
    while not queue.polled.is_set():
        if process.poll() is not None:
            raise StartError(f"{name} did not start: exit code {process.returncode}")
        await asyncio.sleep(0.1)


async def _send_directly(under_test: SystemUnderTest, scenario: Scenario, seconds: float) -> list[RequestTrace]:
    return await closed_loop(under_test.address, scenario.body(), scenario.clients, seconds)


async def _send_as_jobs(queue: QueueServer, scenario: Scenario, seconds: float) -> list[RequestTrace]:
    job_input = {"openai_route": "/v1/chat/completions", "openai_input": scenario.request()}
    queue.latency_s = scenario.latency_ms / 1000
    return await queue.closed_loop(job_input, scenario.clients, seconds)


async def _measure(system: _System, load: Load, seconds: float) -> Measurement:
    scenario = Scenario(clients=load.clients, tokens=_TOKENS, latency_ms=load.latency_ms)
    cpu_s, posts = system.under_test.worker_cpu_s(), system.queue.posts if system.queue else 0
    traces = await system.send(scenario, seconds)
    cpu_s = system.under_test.worker_cpu_s() - cpu_s
    measured = summarize(traces, scenario)
    tokens = len(traces) * _TOKENS
    measured.metrics["cpu_s_per_1000_tokens"] = 1000 * cpu_s / tokens
    if system.queue is not None:
        measured.metrics["deliveries_per_token"] = (system.queue.posts - posts) / tokens
    for error, number in measured.errors.items():
        print_progress(f"{system.under_test.name}: {number} times {error}")
    return measured


def table(tested: Sequence[_System]) -> list[str]:
    """Return the medians of the rounds as a Markdown table, by load."""
    heading = ["clients", "latency, ms", "system", *(METRICS[name] for name in _SHOWN)]
    lines = [f"| {' | '.join(heading)} |", f"|{' --- |' * len(heading)}"]
    for load in dict.fromkeys(load for system in tested for load in system.measured):
        for system in tested:
            if load in system.measured:
                cells = [_median(system.measured[load], name) for name in _SHOWN]
                row = [str(load.clients), str(load.latency_ms), system.under_test.name, *cells]
                lines.append(f"| {' | '.join(row)} |")
    return lines


def _median(measured: Sequence[Measurement], metric: str) -> str:
    values = [value for each in measured if (value := each.metrics[metric]) is not None]
    return report.format_number(median(values)) if values else "-"


def _document(tested: Sequence[_System]) -> list[Mapping[str, Any]]:
    return [
        {
            "system": system.under_test.name,
            "clients": load.clients,
            "latency_ms": load.latency_ms,
            "rounds": [each.metrics for each in measured],
        }
        for system in tested
        for load, measured in system.measured.items()
    ]
