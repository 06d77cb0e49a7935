"""Load-balancing endpoints: SIGTERMs under open-loop load, of which the balancer is told nothing; failures counted.

The balancer learns from its health checks, once a second, that a worker drains. It retries nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from typing import Any

import aiohttp
import pytest

from tests.integration.balancer.conftest import Site, balancer_with
from tests.integration.emulator.conftest import KEY
from tests.soak.conftest import Show

SIGTERMS = int(os.environ.get("BALANCER_SIGTERMS", "200"))
RATE = float(os.environ.get("BALANCER_RATE", "20"))
WORKERS = 5
# SIGTERM is only sent while so many workers serve.
LEAST = 3


async def ask(session: aiohttp.ClientSession, url: str, number: int) -> str:
    """Send a stream, of half a second to two, or a request for a whole answer; return how it ended."""
    text = " ".join([f"request {number}", *(f"word{index}" for index in range(number % 30))])
    body = {"messages": [{"role": "user", "content": text}], "stream": number % 3 != 0}
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            answer = await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"cut: {type(error).__name__}"
    if response.status != 200:
        return f"status {response.status}"
    if not body["stream"]:
        return "right" if json.loads(answer) == {"said": text} else "wrong"
    data = [event.removeprefix("data: ") for event in answer.split("\n\n") if event]
    if data[-1] != "[DONE]" or "error" in answer:
        return "ended by an error"
    said = "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in data[:-1])
    return "right" if said.rstrip() == text else "wrong"


async def send_signals(site: Site, chosen: random.Random) -> int:
    """Send SIGTERM to a worker that serves, until that was done so often; return the number of workers at the least."""
    sent: set[int] = set()
    least = WORKERS
    while len(sent) < SIGTERMS:
        await asyncio.sleep(chosen.uniform(0.2, 0.8))
        state: dict[str, Any] = await asyncio.to_thread(site.state)
        serving = [one["pid"] for one in state["workers"] if one["state"] in ("idle", "running")]
        serving = [pid for pid in serving if pid not in sent]
        if len(serving) >= LEAST:
            pid = chosen.choice(serving)
            os.kill(pid, signal.SIGTERM)
            sent.add(pid)
            least = min(least, len(serving) - 1)
    return least


@pytest.mark.timeout(1800)
def test_no_request_fails_when_workers_are_asked_to_stop(show: Show) -> None:
    settings = {"workersMin": WORKERS, "workersMax": WORKERS, "healthInterval": 1.0, "grace": 60}
    chosen = random.Random(5)  # noqa: S311 (which worker, when)

    async def load(site: Site) -> tuple[Counter[str], int]:
        limits = aiohttp.TCPConnector(limit=0)
        headers = {"Authorization": f"Bearer {KEY}"}
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(connector=limits, headers=headers, timeout=timeout) as session:
            signals = asyncio.create_task(send_signals(site, chosen))
            asking: list[asyncio.Task[str]] = []
            while not signals.done():
                asking.append(asyncio.create_task(ask(session, site.url, len(asking))))
                await asyncio.sleep(chosen.expovariate(RATE))
            return Counter(await asyncio.gather(*asking)), await signals

    with balancer_with(**settings, env={"CONCURRENCY": "64", "PAUSE_S": "0.06"}) as site:
        site.idle_workers(WORKERS, 120)
        begun = time.monotonic()
        ends, least = asyncio.run(load(site))
        seconds = time.monotonic() - begun
        gone = site.state()["gone"]
        statuses = Counter(worker["exitCode"] for worker in gone)
        show(
            f"{SIGTERMS} SIGTERMs in {seconds:.0f} s, at least {least} other workers; {sum(ends.values())} requests: "
            f"{dict(ends)}; exit statuses of the last workers: {dict(statuses)}"
        )
    assert set(ends) == {"right"}
    assert statuses.keys() == {0}, [worker["log"] for worker in gone if worker["exitCode"] != 0]
