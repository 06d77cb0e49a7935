"""`python -m bench streams`: how text reaches many readers at a GPU's speed, measured without one.

vLLM's engine runs with `bench.paced_executor`, so its steps take as long as on an H100. This worker delivers over TLS
to `bench.queue_server`; vLLM's own server is called directly, without TLS. Both engines run all the time, and one of
them gets requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

import psutil

from bench import environment, report, systems
from bench.clients import closed_loop
from bench.metrics import METRICS, Measurement, summarize
from bench.paced_executor import BACKEND
from bench.queue_server import QueueServer
from bench.report import print_progress
from bench.scenarios import Scenario
from bench.systems import VLLM, StartError, SystemUnderTest

CLIENTS = [1, 8, 64, 256]
LATENCIES_MS = [0, 20, 40]
_TOKENS = 128
_BATCH = {"max-num-seqs": "1024", "max-num-batched-tokens": "8192"}
_SHOWN = (
    "requests_per_s", "ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "inter_chunk_p50_ms", "inter_chunk_p95_ms",
    "cpu_s_per_1000_tokens", "deliveries_per_token", "errors",
)  # fmt: skip


async def run(  # noqa: PLR0913 (all that the command line has)
    clients: Sequence[int],
    latencies_ms: Sequence[int],
    rounds: int,
    seconds: float,
    workers: Mapping[str, tuple[Path, Mapping[str, str]]],
    out: Path,
) -> int:
    """Measure; print and write the results; return the exit code.

    Args:
        clients: numbers of streams at once.
        latencies_ms: round-trip times between worker and platform.
        rounds: how often each is measured; the median is reported.
        seconds: for how long jobs are submitted in one measurement.
        workers: by name, the checkout of this repository that a worker runs, and its environment variables.
        out: directory of the results.
    """
    async with AsyncExitStack() as stack:
        logs = out / "logs"
        model = systems.tiny_model()
        ready: dict[str, tuple[SystemUnderTest, QueueServer | None]] = {}
        flags = {"distributed-executor-backend": BACKEND} | _BATCH
        system = stack.enter_context(systems.vllm_server(model, logs, gpu=False, flags=flags))
        ready[VLLM] = system, None
        for name, (root, variables) in workers.items():
            queue = await stack.enter_async_context(QueueServer())
            ready[name] = await _start_worker(stack, name, root, queue, variables, logs), queue
        rows: dict[tuple[str, int, int], list[Measurement]] = {}
        for number in range(rounds):
            for latency_ms in latencies_ms:
                for count in clients:
                    names = [name for name in ready if name != VLLM or latency_ms == latencies_ms[0]]
                    for name in names if number % 2 == 0 else reversed(names):
                        system, queue = ready[name]
                        measured = await _measure(system, queue, count, latency_ms, seconds)
                        rows.setdefault((name, count, latency_ms), []).append(measured)
            print_progress(f"Round {number + 1} of {rounds} is complete")
    text = "\n".join(_table(rows))
    conditions = {**environment.hardware(), **environment.versions(None), "rounds": str(rounds)}
    report.write_text(out / "streams.txt", text + "\n")
    document = {
        "conditions": conditions,
        "measurements": [
            {"system": name, "clients": count, "latency_ms": latency, "rounds": [each.metrics for each in measured]}
            for (name, count, latency), measured in rows.items()
        ],
    }
    report.write_json(out / "streams.json", document)
    print(text)  # noqa: T201
    return 0


async def _start_worker(  # noqa: PLR0913
    stack: AsyncExitStack, name: str, root: Path, queue: QueueServer, variables: Mapping[str, str], logs: Path
) -> SystemUnderTest:
    settings = systems.worker_variables(systems.tiny_model(), gpu=False) | {
        "DISTRIBUTED_EXECUTOR_BACKEND": BACKEND,
        "MAX_NUM_SEQS": _BATCH["max-num-seqs"],
        "MAX_NUM_BATCHED_TOKENS": _BATCH["max-num-batched-tokens"],
        "PYTHONPATH": str(systems.ROOT),
    }
    started_s = time.monotonic()
    process = stack.enter_context(
        systems.run_process(name, [str(root / "handler.py")], logs, settings | queue.environment | dict(variables))
    )
    while not queue.polled.is_set():
        if process.poll() is not None:
            raise StartError(f"{name} did not start: exit code {process.returncode}; see {logs}")
        await asyncio.sleep(0.1)
    return SystemUnderTest(name, None, psutil.Process(process.pid), None, time.monotonic() - started_s)


async def _measure(
    system: SystemUnderTest, queue: QueueServer | None, clients: int, latency_ms: int, seconds: float
) -> Measurement:
    scenario = Scenario(clients=clients, tokens=_TOKENS, latency_ms=latency_ms)
    cpu_s = system.worker_cpu_s()
    if queue is None:
        traces = await closed_loop(system.address, scenario.body(), clients, seconds)
        posts = None
    else:
        queue.latency_s, queue.posts = latency_ms / 1000, 0
        job_input = {"openai_route": "/v1/chat/completions", "openai_input": scenario.request()}
        traces = await queue.closed_loop(job_input, clients, seconds)
        posts = queue.posts
    cpu_s = system.worker_cpu_s() - cpu_s
    measured = summarize(traces, scenario)
    tokens = len(traces) * _TOKENS
    measured.metrics["cpu_s_per_1000_tokens"] = 1000 * cpu_s / tokens
    measured.metrics["deliveries_per_token"] = None if posts is None else posts / tokens
    for error, number in measured.errors.items():
        print_progress(f"{system.name}: {number} times {error}")
    return measured


def _table(rows: Mapping[tuple[str, int, int], Sequence[Measurement]]) -> list[str]:
    lines = ["| system | clients | latency, ms | " + " | ".join(METRICS[name] for name in _SHOWN) + " |"]
    lines.append("| --- " * (3 + len(_SHOWN)) + "|")
    for (name, clients, latency_ms), measured in sorted(rows.items(), key=lambda row: (row[0][1], row[0][2])):
        cells = []
        for metric in _SHOWN:
            values = [value for each in measured if (value := each.metrics[metric]) is not None]
            cells.append(report.format_number(median(values)) if values else "-")
        lines.append(f"| {name} | {clients} | {latency_ms} | " + " | ".join(cells) + " |")
    return lines
