"""`python -m bench`: the worker behind the emulator beside vLLM's own server, on the tiny model, in interleaved rounds.

Each client asks for a streamed chat of 64 tokens as soon as its last one has ended (closed loop). Printed are medians
over the rounds: requests a second, and the time to the first token (TTFT) in milliseconds. Machines are noisy: it is
the ratios that count.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp

_ROOT = Path(__file__).parent.parent
_START_S = 300.0
_TOKENS = 64
_BODY = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "stream": True,
    "max_tokens": _TOKENS,
    "ignore_eos": True,
}
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def main() -> None:
    """Run the measurement and print its table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="length of one measurement")
    arguments = parser.parse_args()
    model = subprocess.run([sys.executable, "-m", "builder", "tiny"], cwd=_ROOT, stdout=subprocess.PIPE, check=True)
    with ExitStack() as stack:
        path = model.stdout.decode().strip()
        urls = {"vLLM alone": stack.enter_context(vllm_alone(path)), "this worker": stack.enter_context(worker(path))}
        asyncio.run(compare(urls, arguments.clients, arguments.rounds, arguments.seconds))


@contextmanager
def vllm_alone(model: str) -> Iterator[str]:
    """VLLM's own server; its OpenAI base URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}", "--enforce-eager"]
    arguments += [f"--model={model}", "--served-model-name=tiny", "--disable-uvicorn-access-log"]
    with started(arguments) as process:
        del process
        yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def worker(model: str) -> Iterator[str]:
    """The emulator with one worker; its OpenAI base URL."""
    options = ["--port=0", "--workers-min=1", "--workers-max=1", "--quiet", "--no-rate-limits"]
    variables = [f"--env=MODEL_NAME={model}", "--env=SERVED_MODEL_NAME=tiny"]
    with started(["-m", "emulator", *options, *variables]) as process:
        if process.stdout is None:
            raise RuntimeError("the emulator has no output")
        lines = (re.search(r"listens on (\S+)", line.decode()) for line in process.stdout)
        yield next(found[1] for found in lines if found) + "/v2/local/openai/v1"


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=_ROOT,
        env={**os.environ, **_ENVIRONMENT},
        stdout=subprocess.PIPE if "emulator" in arguments else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


async def compare(urls: dict[str, str], clients: list[int], rounds: int, seconds: float) -> None:
    """Measure each of the servers in turn, round by round, and print the medians."""
    # Idle connections are closed from here, before a server does so while a request is on its way.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    headers = {"Authorization": "Bearer local"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        for url in urls.values():
            await ready(session, url)
        sys.stdout.write(f"{'':12} {'clients':>7} {'requests/s':>10} {'TTFT p50 ms':>11} {'TTFT p95 ms':>11}\n")
        for count in clients:
            found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in urls}
            for _ in range(rounds):
                for name, url in urls.items():
                    found[name].append(await measure(session, url, count, seconds))
            for name, measured in found.items():
                rate, p50, p95 = (statistics.median(column) for column in zip(*measured, strict=True))
                sys.stdout.write(f"{name:12} {count:7} {rate:10.1f} {1000 * p50:11.0f} {1000 * p95:11.0f}\n")
                sys.stdout.flush()


async def ready(session: aiohttp.ClientSession, url: str) -> None:
    """Wait until the first answer has come."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            await chat(session, url)
        except (aiohttp.ClientError, RuntimeError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)
        else:
            return


async def measure(session: aiohttp.ClientSession, url: str, clients: int, seconds: float) -> tuple[float, float, float]:
    """Requests a second, median and 95th percentile of the time to first token in seconds."""
    firsts: list[float] = []
    begun = time.monotonic()

    async def client() -> None:
        while time.monotonic() - begun < seconds:
            firsts.append(await chat(session, url))

    await asyncio.gather(*(client() for _ in range(clients)))
    elapsed = time.monotonic() - begun
    firsts.sort()
    return len(firsts) / elapsed, statistics.median(firsts), firsts[int(0.95 * (len(firsts) - 1))]


async def chat(session: aiohttp.ClientSession, url: str) -> float:
    """One streamed chat; seconds to its first token.

    Raises:
        RuntimeError: it was refused, or did not end as it has to.
    """
    begun = time.monotonic()
    first: float | None = None
    tail = b""
    async with session.post(f"{url}/chat/completions", json=_BODY) as answer:
        if answer.status != 200:  # noqa: PLR2004 (OK)
            raise RuntimeError(f"status {answer.status}: {await answer.text()}")
        async for chunk in answer.content.iter_any():
            if first is None and re.search(rb'"content":"[^"]', chunk):
                first = time.monotonic() - begun
            tail = (tail + chunk)[-32:]
    if first is None or not tail.endswith(b"data: [DONE]\n\n"):
        raise RuntimeError(f"the stream ends with {tail!r}")
    return first


if __name__ == "__main__":
    main()
