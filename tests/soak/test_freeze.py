"""Workers are frozen and thawed at random moments while jobs run: none is lost, doubled or wrong."""

from __future__ import annotations

import random
import re
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.chaos import is_right, job_input, known_job, real_worker_settings, worker_settings
from tests.integration.emulator.conftest import LLM_START_S, Site, eventually, site_with
from tests.soak.conftest import Show

FREEZES = 500
JOBS = 1000
WORKERS = 8
# How many workers are frozen at once, at most, and how many jobs are in progress or wait.
FREEZERS = 6
CLIENTS = 12
IDLE_FREEZES = 30
REAL_FREEZES = 20
# With these settings of the emulator, a freeze of minutes lasts seconds.
COMPRESSED = {"lostAfter": 3, "pingInterval": 1000, "longPoll": 5}


def freeze_duration_s(rng: random.Random) -> float:
    """Return how long the next freeze lasts: too short to be noticed, noticed, or too long for the platform."""
    return rng.uniform(*rng.choice([(0.05, 1.5), (0.05, 1.5), (2.2, 2.9), (3.5, 5.0)]))


class Freezer(threading.Thread):
    """Freezes and thaws ready workers at random moments, some with their connections, until `count` are done.

    Args:
        site: the emulator.
        seed: of the random sequence.
        busy: those that are frozen by any freezer, under `lock`.
        freezes: what was done: `kept` or `dropped` connections.
        count: how many freezes of all freezers.
    """

    lock = threading.Lock()

    def __init__(self, site: Site, seed: int, busy: set[str], freezes: list[str], count: int) -> None:
        super().__init__(daemon=True)
        self._site, self._busy, self._freezes, self._count = site, busy, freezes, count
        self._random = random.Random(seed)  # noqa: S311 (whom, when, how long)

    def run(self) -> None:
        while True:
            time.sleep(self._random.uniform(0, 0.4))
            ready = [one["id"] for one in self._site.state()["workers"] if one["state"] in ("idle", "running")]
            with self.lock:
                if len(self._freezes) >= self._count:
                    return
                free = sorted(set(ready) - self._busy)
                if not free:
                    continue
                worker = self._random.choice(free)
                drops = self._random.random() < 0.5
                self._busy.add(worker)
                self._freezes.append("dropped" if drops else "kept")
            try:
                self._site.freeze(worker, drops_connections=drops)
                time.sleep(freeze_duration_s(self._random))
                self._site.thaw(worker)
            except httpx.HTTPStatusError:  # The worker has ended.
                with self.lock:
                    self._freezes.remove("dropped" if drops else "kept")
            with self.lock:
                self._busy.discard(worker)


def run_job(site: Site, value: dict[str, Any], expected: str) -> tuple[str, str]:
    """Run a job as a client that reads its stream; return what is to be said of its result and of its stream."""
    job = site.submit(value)
    outputs: list[Any] = []
    while True:
        answer = site.client.get(f"/stream/{job}").raise_for_status().json()
        outputs += [item["output"] for item in answer["stream"]]
        if answer["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
            break
    status = site.status(job)
    result = "right" if is_right(status, expected) else f"{status['status']}: {str(status.get('error'))[:200]}"
    if status.get("retries") and outputs[-len(status["output"]) :] == status["output"]:
        return result, "exact since it was given out again"
    if outputs == status.get("output"):
        return result, "exact"
    return result, "a piece twice" if is_with_repetitions(outputs, status.get("output") or []) else f"wrong: {outputs}"


def is_with_repetitions(outputs: list[Any], expected: list[Any]) -> bool:
    """Return whether the outputs are those that are expected, some of them twice in a row."""
    left = list(expected)
    last: Any = None
    for output in outputs:
        if left and output == left[0]:
            last = left.pop(0)
        elif output != last:
            return False
    return not left


def run_frozen(
    settings: dict[str, Any], values: list[tuple[dict[str, Any], str]], freezes: int, freezers: int, *, tls: bool
) -> tuple[Counter[str], Counter[str], Counter[str], list[float], dict[str, int], float]:
    """Run jobs, at least those of `values` and until all freezes are done.

    Returns:
        How results ended; how streams were; the freezes; seconds from each thaw to the worker's next answer; the
        endpoint's job counters; the duration in seconds.
    """
    events: list[str] = []
    with site_with(tls=tls, events=events, **settings) as site, ThreadPoolExecutor(CLIENTS) as pool:
        site.idle_workers(settings["workersMin"], LLM_START_S)
        begun = time.monotonic()
        done: list[str] = []
        busy: set[str] = set()
        threads = [Freezer(site, seed, busy, done, freezes) for seed in range(freezers)]
        for thread in threads:
            thread.start()
        pending, results = [], []
        number = 0
        while number < len(values) or any(thread.is_alive() for thread in threads):
            value, expected = values[number % len(values)]
            pending.append(pool.submit(run_job, site, value, expected))
            number += 1
            while len(pending) >= CLIENTS:
                results += [one.result() for one in pending if one.done()]
                pending = [one for one in pending if not one.done()]
                time.sleep(0.01)
        results += [one.result(120) for one in pending]
        for thread in threads:
            thread.join()
        counts = site.health()["jobs"]
        seconds = time.monotonic() - begun
    answers_s = sorted(float(found[1]) for line in events if (found := re.search(r"answered (\S+) s after", line)))
    return (
        Counter(result for result, _ in results),
        Counter(stream for _, stream in results),
        Counter(done),
        answers_s,
        counts,
        seconds,
    )


def percentiles_ms(seconds: list[float]) -> str:
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return f"p50 {1000 * cuts[9]:.0f} ms, p95 {1000 * cuts[18]:.0f} ms"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_five_hundred_freezes_while_a_thousand_jobs_run_lose_double_and_spoil_none(tls: bool, show: Show) -> None:
    settings = worker_settings(PAUSE_S="0.25", CONCURRENCY="2", EXECUTION_TIMEOUT_S="20", DELIVERY_TIMEOUT_S="20")
    settings |= {**COMPRESSED, "workersMin": WORKERS, "workersMax": WORKERS}

    results, streams, freezes, answers_s, counts, seconds = run_frozen(
        settings, [job_input(number) for number in range(JOBS)], FREEZES, FREEZERS, tls=tls
    )

    show(
        f"{'HTTPS' if tls else 'HTTP'}: {freezes.total()} freezes ({dict(freezes)}), {results.total()} jobs in "
        f"{seconds:.0f} s: results {dict(results)}, streams {dict(streams)}, {counts}; "
        f"from a thaw to the next answer, of jobs whose words are 0.25 s apart: {percentiles_ms(answers_s)}"
    )
    assert results == {"right": results.total()}
    assert counts["completed"] == results.total() >= JOBS
    assert streams.keys() <= {"exact", "exact since it was given out again", "a piece twice"}
    # Only where a connection was dropped while an output was on its way.
    assert streams["a piece twice"] <= freezes["dropped"] // 10


@pytest.mark.timeout(900)
def test_an_idle_worker_that_is_thawed_answers_at_once(show: Show) -> None:
    """As with FlashBoot: the worker is thawed because of a job that waits."""
    events: list[str] = []
    settings = worker_settings(PAUSE_S="0.001") | {"workersMin": 0, "workersMax": 1, "scalerType": "REQUEST_COUNT"}
    with site_with(events=events, tls=True, **settings, flashboot=True, idleTimeout=0.2) as site:
        for _ in range(IDLE_FREEZES + 1):
            assert is_right(site.ended(site.submit(job_input(2)[0])), job_input(2)[1])
            eventually(lambda: site.state()["workers"][0]["state"] == "frozen")
            time.sleep(2.2)
        (worker,) = site.state()["workers"]
        assert len([line for line in worker["log"] if "Restored" in line]) > 1
    answers_s = [float(found[1]) for line in events if (found := re.search(r"answered (\S+) s after", line))]
    show(f"{len(answers_s)} thaws of an idle worker for a waiting job: first answer after {percentiles_ms(answers_s)}")
    assert len(answers_s) == IDLE_FREEZES
    assert len([line for line in events if line.endswith(" started")]) == 1


@pytest.mark.timeout(1800)
def test_freezes_of_the_real_engine_lose_double_and_spoil_none(tiny_model: str, show: Show) -> None:
    settings = real_worker_settings(tiny_model) | {"lostAfter": 20, "workersMin": 1, "workersMax": 1}
    # Less than a freeze may last.
    settings["env"] |= {"ENGINE_STALL_TIMEOUT_S": "4"}

    results, streams, freezes, answers_s, counts, seconds = run_frozen(
        settings, [known_job(number) for number in range(60)], REAL_FREEZES, 1, tls=True
    )

    show(
        f"Real engine: {freezes.total()} freezes ({dict(freezes)}), {results.total()} jobs in {seconds:.0f} s: results "
        f"{dict(results)}, streams {dict(streams)}, {counts}; from a thaw to the next answer: "
        f"{percentiles_ms(answers_s)}"
    )
    assert results == {"right": results.total()}
    assert counts["completed"] == results.total()
    assert streams.keys() <= {"exact", "a piece twice"}
