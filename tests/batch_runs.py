"""Runs of `python -m batch` in which calls fail, and workers and the client itself are killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos import worker_settings
from tests.integration.emulator.conftest import KEY, Site, site_with
from tests.processes import running

# Some of the client's calls fail, before or after they take effect.
FAULTS: list[dict[str, Any]] = [
    {"kind": kind, "route": route, "rate": 0.005, "when": when, **fields}
    for route in ("run", "status")
    for kind, when, fields in (
        ("error", "before", {"status": 429}),
        ("error", "before", {"status": 500}),
        ("error", "after", {"status": 502}),
        ("drop", "before", {}),
        ("drop", "after", {}),
    )
]


def write_requests(path: Path, bodies: Sequence[dict[str, Any]], url: str = "/v1/chat/completions") -> None:
    """Write a batch file; line 3 is named `line-3`."""
    lines = (
        {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body}
        for number, body in enumerate(bodies)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an output or errors file; none if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@dataclass
class Outcome:
    """How a run with kills ended.

    Attributes:
        right: lines that have their own answer, once.
        others: lines of the output that are not among these, and lines of the errors file.
        jobs: how many jobs the platform completed.
        killed_in_progress: jobs that were in progress on workers when these were killed.
        seconds: from the first start of the client to its end.
        logs: of the client's processes.
    """

    right: int
    others: int
    jobs: int
    killed_in_progress: int
    seconds: float
    logs: list[str]


def run_with_kills(
    directory: Path, count: int, *, kill_workers_at: Sequence[int], kill_client_at: int, tls: bool
) -> Outcome:
    """Run a batch of `count` lines on two scripted workers, over a platform that gives no job out again.

    One in forty of the client's calls fails.

    Args:
        directory: for the files.
        count: number of lines.
        kill_workers_at: after so many answers, a worker gets SIGKILL, each time another.
        kill_client_at: after so many answers, the client gets SIGKILL, and is started again.
        tls: whether the platform serves HTTPS, as RunPod does.
    """
    texts = [f"line {number} " + "word " * (number % 9) for number in range(count)]
    write_requests(
        directory / "in.jsonl",
        [{"model": "scripted", "messages": [{"role": "user", "content": text}]} for text in texts],
    )
    output = directory / "out.jsonl"
    settings = worker_settings(PAUSE_S="0.2") | {"maxRetries": 0, "rateLimits": True}
    logs = []
    with site_with(tls=tls, **settings) as site:
        site.idle_workers(2)
        site.faults(*FAULTS)
        environment = {"RUNPOD_API_KEY": KEY, "SSL_CERT_FILE": str(site.ca_file) if tls else ""}
        arguments = ["-m", "batch", "run", str(directory / "in.jsonl"), "-o", str(output)]
        arguments += ["--base-url", f"{site.url}/v2", "--endpoint", "ep"]
        killed_in_progress = 0
        begun = time.monotonic()
        for last in (False, True):
            with running(arguments, environment, directory / f"log-{last}") as client:
                for at in kill_workers_at:
                    if (at > kill_client_at) is last:
                        client.wait_for(_has_lines(output, at), 300)
                        killed_in_progress += _kill_a_busy_worker(site)
                if last:
                    status = client.popen.wait(300)
                    seconds = time.monotonic() - begun
                else:
                    client.wait_for(_has_lines(output, kill_client_at), 300)
                    client.popen.kill()
            logs.append(client.log_path.read_text(encoding="utf-8"))
        assert status == 0, logs
        jobs = site.health()["jobs"]["completed"]
    answers = read_lines(output)
    found = Counter(line["custom_id"] for line in answers if _is_right(line, texts))
    right = sum(times == 1 for times in found.values())
    others = len(answers) - right + len(read_lines(output.with_suffix(".errors.jsonl")))
    return Outcome(right, others, jobs, killed_in_progress, seconds, logs)


def _has_lines(path: Path, count: int) -> Callable[[], bool]:
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= count


def _is_right(line: dict[str, Any], texts: list[str]) -> bool:
    response = line["response"]
    expected = {"said": texts[int(line["custom_id"].removeprefix("line-"))]}
    return line["error"] is None and response["status_code"] == 200 and response["body"] == expected


def _kill_a_busy_worker(site: Site) -> int:
    """Send SIGKILL to the worker that runs the most jobs; return how many those were."""
    while True:
        workers = [worker for worker in site.state()["workers"] if worker["pid"] and worker["jobs"]]
        if workers:
            worker = max(workers, key=lambda one: len(one["jobs"]))
            os.kill(worker["pid"], signal.SIGKILL)
            return len(worker["jobs"])
        time.sleep(0.01)
