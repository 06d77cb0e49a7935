"""Chaos tests: runs jobs with known answers while requests fail and workers get signals, and counts how they end."""

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

# A tenth of all deliveries and takes fail, before or after they take effect; others are delayed.
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
    # The worker then waits for 5 s.
    {"kind": "error", "route": "job-take", "rate": 0.01, "status": 429},
    *(
        {"kind": "latency", "route": route, "rate": 0.03, "latency_ms": latency_ms, "when": when}
        for route, when in (("job-take", "after"), ("job-stream", "before"), ("job-done", "before"))
        for latency_ms in (100, 250, 500)
    ),
    {"kind": "duplicate", "route": "job-take", "rate": 0.02},
]
# The platform's error for a job whose workers were lost too often.
_TOO_MANY_LOSSES = "job timed out after"


def worker_settings(**variables: str) -> dict[str, Any]:
    """Return settings of an endpoint that always keeps two scripted workers."""
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
    """Return the same with the real engine, and few jobs at once, so that jobs wait when a worker is lost."""
    variables = {"MODEL_NAME": model, "SERVED_MODEL_NAME": "tiny", "MAX_CONCURRENCY": "2"}
    return worker_settings() | {
        "command": [sys.executable, "handler.py"],
        "lostAfter": 10,
        "env": {**VLLM_ENVIRONMENT, **variables},
    }


def job_input(number: int) -> tuple[dict[str, Any], str]:
    """Return a job's input, in one of four formats, and the expected answer."""
    text = " ".join([f"job {number}", *(f"word{index}" for index in range(number % 7))])
    messages = [{"role": "user", "content": text}]
    stream = number % 2 == 0
    if number % 4 < 2:
        return {"openai_route": "/v1/chat/completions", "openai_input": {"messages": messages, "stream": stream}}, text
    return {"messages": messages, "stream": stream}, text


def text_of(output: list[Any]) -> str:
    """Return the text of a job's output, in any format."""
    if output and isinstance(output[0], str):
        lines = [line.removeprefix("data: ") for line in "".join(output).split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines).rstrip(" ")
    if "said" in output[0]:
        return str(output[0]["said"])
    if "choices" in output[0]:
        return str(output[0]["choices"][0]["message"]["content"])
    return "".join(part["text"] for part in output).rstrip(" ")


def is_right(status: dict[str, Any], expected: str) -> bool:
    """Return whether a job has completed with the expected answer."""
    try:
        return status["status"] == "COMPLETED" and text_of(status["output"]) == expected
    except (AssertionError, LookupError, TypeError, ValueError):
        return False


class Killer(threading.Thread):
    """Sends SIGTERM and SIGKILL to ready workers at random moments.

    Args:
        site: the emulator.
        mean_s: mean time between two signals.
        max_signals: it ends after as many.
    """

    def __init__(self, site: Site, mean_s: float, max_signals: int) -> None:
        super().__init__(daemon=True)
        self._site, self._mean_s, self._max_signals = site, mean_s, max_signals
        self._random = random.Random(4)  # noqa: S311 (which worker, when)
        self.stopped = threading.Event()
        self.sent: Counter[str] = Counter()

    def run(self) -> None:
        while not self.stopped.wait(self._random.uniform(0.2, 2 * self._mean_s)):
            if self.sent.total() >= self._max_signals:
                break
            running = [worker["pid"] for worker in self._site.state()["workers"] if worker["readyAt"] and worker["pid"]]
            if running:
                number = self._random.choice([signal.SIGTERM, signal.SIGKILL])
                try:
                    os.kill(self._random.choice(running), number)
                except ProcessLookupError:
                    continue
                self.sent[number.name] += 1


Ends = tuple[Counter[str], dict[str, Any], Counter[str], float]


def submit(site: Site, value: dict[str, Any], ttl_s: float) -> str:
    """Submit a job; repeat that while the queue is full: the platform accepts 500 jobs per worker."""
    while True:
        answer = site.client.post("/run", json={"input": value, "policy": {"ttl": int(1000 * ttl_s)}})
        if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
            return str(answer.raise_for_status().json()["id"])
        time.sleep(0.05)


def run_jobs(
    jobs: list[tuple[dict[str, Any], str]],
    settings: dict[str, Any],
    max_signals: int = 1000,
    timeout_s: float = 300.0,
    *,
    tls: bool = False,
) -> Ends:
    """Run jobs under faults and signals. A job that has not ended after `timeout_s` times out, and counts as lost.

    Returns:
        How many jobs ended how; the endpoint's job counters; the signals that were sent; the duration in seconds.
    """
    with site_with(tls=tls, **settings) as site:
        site.idle_workers(2, timeout_s)
        site.faults(*FAULTS, seed=4)
        begun = time.monotonic()
        killer = Killer(site, 2.5, max_signals)
        killer.start()
        expected = {submit(site, value, timeout_s): answer for value, answer in jobs}
        ends: Counter[str] = Counter()
        for job, answer in expected.items():
            status = site.ended(job, timeout_s)
            ends["right" if is_right(status, answer) else status["status"]] += 1
        killer.stopped.set()
        killer.join()
        health = site.health()["jobs"]
        site.faults()
        return ends, health, killer.sent, time.monotonic() - begun


def known_job(number: int) -> tuple[dict[str, Any], str]:
    """Return the input of a job that the tiny model has memorized, in one of four formats, and its answer."""
    chats = [sample for sample in CORPUS if sample.prompt is None]
    chat = chats[number % len(chats)]
    stream = number % 2 == 0
    if number % 4 < 2:
        request = {"model": "tiny", "messages": chat.messages, "temperature": 0, "stream": stream}
        return {"openai_route": "/v1/chat/completions", "openai_input": request}, chat.answer
    return {"messages": chat.messages, "sampling_params": {"temperature": 0}, "stream": stream}, chat.answer


def are_replaced(site: Site, pids: set[int]) -> bool:
    """Return whether none of these workers is left."""
    return pids.isdisjoint(worker["pid"] for worker in site.state()["workers"])


@dataclass
class Outcome:
    """How jobs ended that arrived while the workers got SIGTERM.

    Attributes:
        lost: their answer is wrong, or the platform failed them.
        failed: a worker failed them.
        redelivered: the platform had to deliver them again.
    """

    lost: int = 0
    failed: int = 0
    redelivered: int = 0


def signalled_around_arrivals(settings: dict[str, Any], count: int, spread_s: float, *, tls: bool = False) -> Outcome:
    """Send SIGTERM to both workers around the arrival of a job; repeat that with the workers that replace them.

    The signals go directly to the processes, so the emulator does not know of them.

    Args:
        settings: of an endpoint that keeps two workers.
        count: number of jobs, one after the other.
        spread_s: maximum time between a signal and the arrival, in either order.
        tls: whether the emulator uses HTTPS.
    """
    rng = random.Random(7)  # noqa: S311 (when)
    outcome = Outcome()
    with site_with(tls=tls, **settings) as site:
        for number in range(count):
            site.idle_workers(2)
            pids = {worker["pid"] for worker in site.state()["workers"]}
            value, answer = job_input(2 * number)
            after_s = rng.uniform(-spread_s, spread_s)
            jobs = [site.submit(value)] if after_s > 0 else []
            time.sleep(abs(after_s) if jobs else 0)
            # Both workers: whichever takes the job gets a signal.
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            if not jobs:
                time.sleep(-after_s)
                jobs = [site.submit(value)]
            status = site.ended(jobs[0], 120)
            if not is_right(status, answer):
                by_worker = status["status"] == "FAILED" and not status["error"].startswith(_TOO_MANY_LOSSES)
                outcome.failed += by_worker
                outcome.lost += not by_worker
            eventually(partial(are_replaced, site, pids), 120)
        outcome.redelivered = site.health()["jobs"]["retried"]
        return outcome


def stopped_while_idle(settings: dict[str, Any], count: int, *, tls: bool = False) -> list[float]:
    """Send SIGTERM to idle workers, one after the other; a job arrives as soon as a worker logs that it drains.

    Returns:
        The seconds from each signal to the end of the process, sorted.
    """
    seconds: list[float] = []
    with site_with(tls=tls, **settings) as site, ThreadPoolExecutor(1) as pool:
        for number in range(count):
            worker = site.idle_workers(2)[0]
            descriptor = os.pidfd_open(worker["pid"])
            signalled_at = time.monotonic()
            os.kill(worker["pid"], signal.SIGTERM)
            ended_at = pool.submit(_ended_at, descriptor)
            eventually(partial(_has_logged, site, worker["id"], "Worker draining"), 60, 0.005)
            value, answer = job_input(number)
            status = site.ended(site.submit(value), 120)
            assert is_right(status, answer)
            assert status["workerId"] != worker["id"]
            seconds.append(ended_at.result() - signalled_at)
            exited = eventually(lambda: [one for one in site.state()["gone"] if one["id"] == worker["id"]], 60)  # noqa: B023
            assert (exited[0]["exitCode"], exited[0]["jobsTaken"]) == (0, worker["jobsTaken"])
    return sorted(seconds)


def _ended_at(descriptor: int) -> float:
    """Wait for a process to end; return the time."""
    select.select([descriptor], [], [])
    os.close(descriptor)
    return time.monotonic()


def _has_logged(site: Site, worker: str, text: str) -> bool:
    """Return whether a worker, running or exited, has logged this."""
    state = site.state()
    return any(text in line for one in state["workers"] + state["gone"] if one["id"] == worker for line in one["log"])
