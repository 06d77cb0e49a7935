"""Jobs whose answers are known, for workers that nothing goes well for: faults on the way, and signals."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from builder.tiny_model.corpus import CORPUS
from tests.integration.emulator.conftest import REPOSITORY, Site, eventually, site_with
from tests.processes import VLLM_ENVIRONMENT

# A tenth of all deliveries and takes fail, before or after they have had their effect, in mixed ways; latency jumps.
FAULTS: list[dict[str, Any]] = [
    *(
        {"kind": "error", "route": route, "rate": 0.02, "status": status, "when": when}
        for route in ("job-take", "job-stream", "job-done")
        for status, when in ((500, "before"), (502, "after"), (503, "before"), (503, "after"), (429, "before"))
        if (route, status) != ("job-take", 429)
    ),
    *(
        {"kind": "drop", "route": route, "rate": 0.01, "when": when}
        for route, when in (
            ("job-take", "before"),
            ("job-take", "after"),
            ("job-stream", "after"),
            ("job-done", "before"),
        )
    ),
    # The worker waits for 5 s then.
    {"kind": "error", "route": "job-take", "rate": 0.01, "status": 429},
    *(
        {"kind": "latency", "route": route, "rate": 0.03, "latency_ms": latency_ms, "when": when}
        for route, when in (("job-take", "after"), ("job-stream", "before"), ("job-done", "before"))
        for latency_ms in (100, 250, 500)
    ),
    {"kind": "duplicate", "route": "job-take", "rate": 0.02},
]
# What the platform says of a job whose worker was lost once too often.
_GIVEN_UP = "job timed out after"


def worker_settings(**variables: str) -> dict[str, Any]:
    """An endpoint that keeps two scripted workers, whatever happens to them."""
    return {
        "command": [sys.executable, "-m", "tests.scripted_worker"],
        "cwd": str(REPOSITORY),
        "env": {"CONCURRENCY": "32", **variables},
        "workersMin": 2,
        "workersMax": 2,
        "maxRetries": 1000,
        "pingInterval": 1000,
        "lostAfter": 8,
        "rateLimits": False,
    }


def real_worker_settings(model: str) -> dict[str, Any]:
    """The same with the real engine, and few jobs at once: there is something to lose when a worker goes."""
    variables = {"MODEL_NAME": model, "SERVED_MODEL_NAME": "tiny", "MAX_CONCURRENCY": "2"}
    return worker_settings() | {
        "command": [sys.executable, "handler.py"],
        "lostAfter": 10,
        "env": {**VLLM_ENVIRONMENT, **variables},
    }


def job_input(number: int) -> tuple[dict[str, Any], str]:
    """The input of a job, one of four forms, and what it has to say."""
    said = " ".join([f"job {number}", *(f"word{index}" for index in range(number % 7))])
    messages = [{"role": "user", "content": said}]
    stream = number % 2 == 0
    if number % 4 < 2:
        return {"openai_route": "/v1/chat/completions", "openai_input": {"messages": messages, "stream": stream}}, said
    return {"messages": messages, "stream": stream}, said


def said_by(output: list[Any]) -> str:
    """What a job's result says."""
    if output and isinstance(output[0], str):
        lines = [line.removeprefix("data: ") for line in "".join(output).split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines).rstrip(" ")
    if "said" in output[0]:
        return str(output[0]["said"])
    if "choices" in output[0]:
        return str(output[0]["choices"][0]["message"]["content"])
    return "".join(part["text"] for part in output).rstrip(" ")


def is_right(status: dict[str, Any], said: str) -> bool:
    """Whether a job has ended with the answer that it was to give."""
    try:
        return status["status"] == "COMPLETED" and said_by(status["output"]) == said
    except (AssertionError, LookupError, TypeError, ValueError):
        return False


class Killer(threading.Thread):
    """Sends SIGTERM and SIGKILL to workers at random moments, until it is told to stop or has sent the most."""

    def __init__(self, site: Site, every_s: float, most: int) -> None:
        super().__init__(daemon=True)
        self._site, self._every_s, self._most = site, every_s, most
        self._random = random.Random(4)  # noqa: S311 (which worker, when)
        self.over = threading.Event()
        self.sent: Counter[str] = Counter()

    def run(self) -> None:
        while self.sent.total() < self._most and not self.over.wait(self._random.uniform(0.2, 2 * self._every_s)):
            running = [one["pid"] for one in self._site.state()["workers"] if one["readyAt"] and one["pid"]]
            if running:
                number = self._random.choice([signal.SIGTERM, signal.SIGKILL])
                try:
                    os.kill(self._random.choice(running), number)
                except ProcessLookupError:
                    continue
                self.sent[number.name] += 1


Ends = tuple[Counter[str], dict[str, Any], Counter[str], float]


def submitted(site: Site, value: dict[str, Any], ttl_s: float) -> str:
    """Submit a job, and again while the queue is full: the platform takes 500 a worker."""
    while True:
        answer = site.client.post("/run", json={"input": value, "policy": {"ttl": int(1000 * ttl_s)}})
        if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
            return str(answer.raise_for_status().json()["id"])
        time.sleep(0.05)


def run_jobs(
    jobs: list[tuple[dict[str, Any], str]],
    settings: dict[str, Any],
    most_signals: int = 1000,
    timeout_s: float = 300.0,
    *,
    tls: bool = False,
) -> Ends:
    """Run jobs under faults and signals: how they ended, the endpoint's figures, the signals, the seconds.

    A job that is not there any more after `timeout_s` is lost: it has timed out.
    """
    with site_with(tls=tls, **settings) as site:
        site.idle_workers(2, timeout_s)
        site.faults(*FAULTS, seed=4)
        begun = time.monotonic()
        killer = Killer(site, 2.5, most_signals)
        killer.start()
        asked = {submitted(site, value, timeout_s): said for value, said in jobs}
        ends: Counter[str] = Counter()
        for job, said in asked.items():
            status = site.ended(job, timeout_s)
            ends["right" if is_right(status, said) else status["status"]] += 1
        killer.over.set()
        killer.join()
        health = site.health()["jobs"]
        site.faults()
        return ends, health, killer.sent, time.monotonic() - begun


def known_job(number: int) -> tuple[dict[str, Any], str]:
    """A job that the tiny model knows by heart, in one of four forms, and its answer."""
    known = [one for one in CORPUS if one.prompt is None]
    one = known[number % len(known)]
    stream = number % 2 == 0
    if number % 4 < 2:
        asked = {"model": "tiny", "messages": one.messages, "temperature": 0, "stream": stream}
        return {"openai_route": "/v1/chat/completions", "openai_input": asked}, one.answer
    return {"messages": one.messages, "sampling_params": {"temperature": 0}, "stream": stream}, one.answer


def replaced(site: Site, pids: set[int]) -> bool:
    """Whether none of these workers is there any more."""
    return pids.isdisjoint(worker["pid"] for worker in site.state()["workers"])


@dataclass
class Outcome:
    """What became of jobs that came as their workers were told to stop.

    Args:
        lost: the platform gave up on them, or their answer is not the right one.
        failed: a worker ended them with an error.
        rescued: the platform had to give them out again.
    """

    lost: int = 0
    failed: int = 0
    rescued: int = 0


def signalled_around_arrivals(settings: dict[str, Any], count: int, spread_s: float, *, tls: bool = False) -> Outcome:
    """Send SIGTERM to two workers around the arrival of a job, so many times; the next ones take their place.

    The signals go to the processes, so that the emulator does not know.

    Args:
        settings: of an endpoint that keeps two workers.
        count: how many jobs, one after the other.
        spread_s: a signal comes so long before the arrival at most, or after it.
        tls: whether the platform speaks HTTPS.
    """
    chance = random.Random(7)  # noqa: S311 (when)
    outcome = Outcome()
    with site_with(tls=tls, **settings) as site:
        for number in range(count):
            site.idle_workers(2)
            pids = {one["pid"] for one in site.state()["workers"]}
            value, said = job_input(2 * number)
            after_s = chance.uniform(-spread_s, spread_s)
            jobs = [site.submit(value)] if after_s > 0 else []
            time.sleep(abs(after_s) if jobs else 0)
            # Both workers: whichever takes the job has been told to stop.
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            if not jobs:
                time.sleep(-after_s)
                jobs = [site.submit(value)]
            status = site.ended(jobs[0], 120)
            if not is_right(status, said):
                by_worker = status["status"] == "FAILED" and not status["error"].startswith(_GIVEN_UP)
                outcome.failed += by_worker
                outcome.lost += not by_worker
            eventually(partial(replaced, site, pids), 120)
        outcome.rescued = site.health()["jobs"]["retried"]
        return outcome


def stopped_while_idle(settings: dict[str, Any], count: int, *, tls: bool = False) -> list[float]:
    """Send SIGTERM to idle workers, one after the other: the seconds from each signal to the process's end, sorted.

    As soon as a worker says that it stops, a job comes, which is not to be given to it.
    """
    seconds: list[float] = []
    with site_with(tls=tls, **settings) as site, ThreadPoolExecutor(1) as pool:
        for number in range(count):
            worker = site.idle_workers(2)[0]
            descriptor = os.pidfd_open(worker["pid"])
            signalled_at = time.monotonic()
            os.kill(worker["pid"], signal.SIGTERM)
            ended_at = pool.submit(_ended_at, descriptor)
            eventually(partial(_says, site, worker["id"], "Worker draining"), 60, 0.005)
            value, said = job_input(number)
            status = site.ended(site.submit(value), 120)
            assert is_right(status, said)
            assert status["workerId"] != worker["id"]
            seconds.append(ended_at.result() - signalled_at)
            gone = eventually(lambda: [one for one in site.state()["gone"] if one["id"] == worker["id"]], 60)  # noqa: B023
            assert (gone[0]["exitCode"], gone[0]["jobsTaken"]) == (0, worker["jobsTaken"])
    return sorted(seconds)


def _ended_at(descriptor: int) -> float:
    """When a process ends."""
    select.select([descriptor], [], [])
    os.close(descriptor)
    return time.monotonic()


def _says(site: Site, worker: str, text: str) -> bool:
    """Whether a worker that is there, or has been, has logged this."""
    state = site.state()
    return any(text in line for one in state["workers"] + state["gone"] if one["id"] == worker for line in one["log"])
