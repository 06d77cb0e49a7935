"""What telemetry costs: two workers on the tiny model, one that exports and one that does not, asked in turns.

    python -m bench.telemetry [--rounds 6] [--clients 16] [--tokens 96] [--paced] [--prometheus PATH --pictures DIR]

Prints the medians, and the ratios of pairs of rounds: tokens a second, time to the first token, processor time. With
Prometheus' program, it also keeps the metrics, evaluates each query of the dashboard
(`dashboards/vllm-serverless.json`), and draws the panels and two traces into a directory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from bench.collector import OTLPReceiver, receiving
from emulator.app import Emulator, run_in_thread
from emulator.core.process import worker_environment
from emulator.settings import EmulatorSettings

ROOT = Path(__file__).parents[1]
_KEY = "rpa_notarealkey"
_START_S = 200.0
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
_FIELDS = (
    ("tokens_per_s", "tokens/s"),
    ("first_token_s", "s to the first token"),
    ("cpu_ms_per_1000_tokens", "ms of processor time for 1000 tokens"),
)
_PROMPTS = ("Write a Python game.", "Hello!", "Write a poem in Chinese.", "January,")


@dataclass(frozen=True)
class Round:
    """What one round measured. Processor time is that of the worker's own process, which runs the event loop."""

    tokens_per_s: float
    first_token_s: float
    cpu_ms_per_1000_tokens: float


@dataclass(frozen=True)
class Load:
    """How many clients ask at once, for how long, and for how many tokens each time."""

    clients: int
    seconds: float
    tokens: int


class System:
    """One worker, with an endpoint of its own."""

    def __init__(self, emulator: Emulator, name: str) -> None:
        self.name = name
        self.url = f"{emulator.url}/v2/{name}"
        self.process: psutil.Process | None = None
        self.environment = worker_environment(emulator.url, name, f"worker-{name}", _KEY, ping_interval_ms=10_000)

    async def is_ready(self, client: httpx.AsyncClient) -> bool:
        """Return whether its worker polls."""
        workers = (await client.get(f"{self.url}/health")).json()["workers"]
        return bool(workers["idle"] + workers["running"])

    async def measure(self, client: httpx.AsyncClient, load: Load) -> Round:
        """Send streamed chats in a closed loop."""
        until, tokens_each = time.monotonic() + load.seconds, load.tokens
        firsts_s: list[float] = []
        tokens = 0

        async def run(number: int) -> None:
            nonlocal tokens
            while time.monotonic() < until:
                number += 1
                prompt = f"{_PROMPTS[number % len(_PROMPTS)]} {number}"
                body = {"model": "tiny", "stream": True, "max_tokens": tokens_each, "ignore_eos": True}
                body["messages"] = [{"role": "user", "content": prompt}]
                begun = time.monotonic()
                first_s = None
                async with client.stream("POST", f"{self.url}/openai/v1/chat/completions", json=body) as answer:
                    async for line in answer.aiter_lines():
                        if first_s is None and '"content":"' in line and '"content":""' not in line:
                            first_s = time.monotonic() - begun
                if first_s is not None:
                    firsts_s.append(first_s)
                    tokens += tokens_each

        begun, cpu_s = time.monotonic(), self._cpu_s()
        await asyncio.gather(*(run(1000 * number) for number in range(load.clients)))
        cpu_ms = 1000 * (self._cpu_s() - cpu_s)
        return Round(tokens / (time.monotonic() - begun), statistics.median(firsts_s), 1000 * cpu_ms / tokens)

    def _cpu_s(self) -> float:
        if self.process is None:
            raise RuntimeError("no worker runs")
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def worker(system: System, environment: dict[str, str], log: Path) -> Iterator[None]:
    """Run a worker during the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "handler.py"],
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT, **system.environment, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        system.process = psutil.Process(process.pid)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


async def compare(off: System, on: System, rounds: int, load: Load) -> list[tuple[Round, Round]]:
    """Measure both in turns, in alternating order; the first pair is a warm-up."""
    pairs = []
    async with httpx.AsyncClient(headers={"Authorization": _KEY}, timeout=120) as client:
        deadline = time.monotonic() + _START_S
        while not (await off.is_ready(client) and await on.is_ready(client)):
            if time.monotonic() > deadline:
                raise TimeoutError("the workers do not start")
            await asyncio.sleep(0.2)
        for number in range(rounds + 1):
            found: dict[str, Round] = {}
            for system in (off, on) if number % 2 else (on, off):
                found[system.name] = await system.measure(client, load)
            if number:
                pairs.append((found[off.name], found[on.name]))
                sys.stdout.write(f"{json.dumps([found[one.name].__dict__ for one in (off, on)])}\n")
                sys.stdout.flush()
    return pairs


def report(pairs: list[tuple[Round, Round]]) -> str:
    """Return medians and the median of the pairs' ratios."""
    lines = []
    for field, unit in _FIELDS:
        off, on = ([getattr(pair[index], field) for pair in pairs] for index in (0, 1))
        ratios = [b / a for a, b in zip(off, on, strict=True)]
        lines.append(
            f"{unit}: off {statistics.median(off):.4g}, on {statistics.median(on):.4g}; "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--paced", action="store_true", help="with the steps of a GPU (`bench.paced_executor`)")
    parser.add_argument("--prometheus", type=Path)
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    model = subprocess.run([sys.executable, "-m", "builder", "tiny"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    names = ("off", "on")
    endpoints = [{"id": name, "rateLimits": False} for name in names]
    settings = EmulatorSettings.model_validate({"port": 0, "apiKeys": [_KEY], "endpoints": endpoints})
    shared = {"MODEL_NAME": model.stdout.decode().strip(), "SERVED_MODEL_NAME": "tiny"}
    if arguments.paced:
        shared |= {"DISTRIBUTED_EXECUTOR_BACKEND": "bench.paced_executor.PacedExecutor", "PYTHONPATH": str(ROOT)}
    load = Load(arguments.clients, arguments.seconds, arguments.tokens)
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        receiver: OTLPReceiver = stack.enter_context(receiving())
        emulator = stack.enter_context(run_in_thread(settings))
        prometheus = None
        if arguments.prometheus is not None:
            from bench import dashboard

            prometheus = stack.enter_context(dashboard.prometheus(arguments.prometheus, receiver, logs))
        off, on = (System(emulator, name) for name in names)
        with ExitStack() as workers:
            exported = {
                "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
                "OTEL_METRIC_EXPORT_INTERVAL": "5000",
                "PRICE_PER_SECOND": "0.0003",
            }
            # A job that waits for the start.
            workers.enter_context(worker(off, shared, logs / "off"))
            job = {
                "input": {"messages": [{"role": "user", "content": "Hello!"}], "sampling_params": {"max_tokens": 40}}
            }
            httpx.post(f"{on.url}/run", json=job, headers={"Authorization": _KEY}).raise_for_status()
            workers.enter_context(worker(on, {**shared, **exported}, logs / "on"))
            sys.stdout.write(report(asyncio.run(compare(off, on, arguments.rounds, load))))
            sys.stdout.write("\n")
            if prometheus is not None:
                time.sleep(8)
                dashboard.draw(prometheus, receiver, arguments.pictures)


if __name__ == "__main__":
    main()
