"""Whatever fails on the way, every job ends once, with the right answer: real SDK, real HTTP, real signals."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from functools import partial
from typing import Any

import httpx
import pytest

from builder.tiny_corpus import CORPUS
from tests.integration.emulator.conftest import REPOSITORY, Site, eventually, site_with
from tests.processes import VLLM_ENVIRONMENT

# A tenth of all deliveries and takes fail, before or after they have had their effect, in mixed ways.
FAULTS: list[dict[str, Any]] = [
    {"kind": "error", "route": route, "rate": 0.04, "status": 503, "when": when}
    for route in ("job-take", "job-stream", "job-done")
    for when in ("before", "after")
] + [
    {"kind": "drop", "route": "job-stream", "rate": 0.02, "when": "after"},
    {"kind": "drop", "route": "job-done", "rate": 0.02, "when": "before"},
    {"kind": "error", "route": "job-take", "rate": 0.01, "status": 429},
    {"kind": "error", "route": "job-done", "rate": 0.02, "status": 429},
    {"kind": "latency", "route": "job-stream", "rate": 0.05, "latency_ms": 250},
    {"kind": "latency", "route": "job-done", "rate": 0.05, "latency_ms": 500},
    {"kind": "latency", "route": "job-take", "rate": 0.05, "latency_ms": 500, "when": "after"},
]


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


def run_jobs(jobs: list[tuple[dict[str, Any], str]], settings: dict[str, Any], most_signals: int = 1000) -> Ends:
    """Run jobs under faults and signals: how they ended, the endpoint's figures, the signals, the seconds."""
    timeout_s = 300.0
    with site_with(**settings) as site:
        site.idle_workers(2, timeout_s)
        site.faults(*FAULTS, seed=4)
        begun = time.monotonic()
        killer = Killer(site, 2.5, most_signals)
        killer.start()
        asked = {submitted(site, value, timeout_s): said for value, said in jobs}
        ends: Counter[str] = Counter()
        for job, said in asked.items():
            status = site.ended(job, timeout_s)
            right = status["status"] == "COMPLETED" and said_by(status["output"]) == said
            ends["right" if right else status["status"]] += 1
        killer.over.set()
        killer.join()
        health = site.health()["jobs"]
        site.faults()
        return ends, health, killer.sent, time.monotonic() - begun


def replaced(site: Site, pids: set[int]) -> bool:
    """Whether none of these workers is there any more."""
    return pids.isdisjoint(worker["pid"] for worker in site.state()["workers"])


def test_two_thousand_jobs_end_once_each_with_the_right_answer(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [job_input(number) for number in range(2000)]

    ends, health, signals, seconds = run_jobs(jobs, worker_settings())

    with capsys.disabled():
        print(f"\n2000 jobs in {seconds:.0f} s: {dict(ends)}, {health['retried']} retried, {dict(signals)}")  # noqa: T201
    assert ends == {"right": 2000}
    assert health["completed"] == 2000
    assert signals["SIGTERM"] + signals["SIGKILL"] >= 4


def known_job(number: int) -> tuple[dict[str, Any], str]:
    """A job that the tiny model knows by heart, in one of four forms, and its answer."""
    known = [one for one in CORPUS if one.prompt is None]
    one = known[number % len(known)]
    stream = number % 2 == 0
    if number % 4 < 2:
        asked = {"model": "tiny", "messages": one.messages, "temperature": 0, "stream": stream}
        return {"openai_route": "/v1/chat/completions", "openai_input": asked}, one.answer
    return {"messages": one.messages, "sampling_params": {"temperature": 0}, "stream": stream}, one.answer


def test_two_hundred_jobs_of_the_real_engine_end_with_the_right_answer(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few at once, so that there is something to lose when a worker goes; its next one takes half a minute to start."""
    own = {"command": [sys.executable, "handler.py"], "lostAfter": 10}
    variables = {"MODEL_NAME": tiny_model, "SERVED_MODEL_NAME": "tiny", "MAX_CONCURRENCY": "2"}
    settings = worker_settings() | own | {"env": {**VLLM_ENVIRONMENT, **variables}}

    ends, health, signals, seconds = run_jobs([known_job(number) for number in range(200)], settings, most_signals=3)

    with capsys.disabled():
        print(f"\n200 real jobs in {seconds:.0f} s: {dict(ends)}, {health['retried']} retried, {dict(signals)}")  # noqa: T201
    assert ends == {"right": 200}
    assert signals["SIGTERM"] + signals["SIGKILL"] >= 1


def test_sigterm_around_a_jobs_arrival_loses_none(capsys: pytest.CaptureFixture[str]) -> None:
    """The signal goes to the process, so that the emulator does not know: nothing may need its rescue."""
    count = int(os.environ.get("SIGTERMS", "24"))
    chance = random.Random(7)  # noqa: S311 (when)
    with site_with(**worker_settings(PAUSE_S="0.05")) as site:
        for number in range(count):
            site.idle_workers(2)
            pids = {one["pid"] for one in site.state()["workers"]}
            value, said = job_input(2 * number)
            # From 50 ms before the arrival to 50 ms after it.
            after_s = chance.uniform(-0.05, 0.05)
            jobs = [site.submit(value)] if after_s > 0 else []
            time.sleep(abs(after_s) if jobs else 0)
            # Both workers: whichever takes the job has been told to stop.
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            if not jobs:
                time.sleep(-after_s)
                jobs = [site.submit(value)]
            assert said_by(site.ended(jobs[0], 60)["output"]) == said
            eventually(partial(replaced, site, pids))
        retried = site.health()["jobs"]["retried"]
    with capsys.disabled():
        print(f"\n{2 * count} SIGTERMs around {count} arrivals: {retried} jobs needed the platform's rescue")  # noqa: T201
    assert retried == 0
