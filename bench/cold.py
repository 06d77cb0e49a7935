"""`python -m bench cold`: the time from a worker's exec to the first token of a job that is already in the queue.

Each start has a new emulator without workers. A streamed chat job of 16 tokens is submitted, which makes the
autoscaler start a worker. The time runs from the worker's start to the first text that the client receives. That start
is the emulator's `startedAt`, just before it starts the worker's launcher; the exec follows about 30 ms later, the same
for both workers.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path
from statistics import median

import uvloop

from bench import environment, goals, report, synthetic_model, systems
from bench.clients import send
from bench.metrics import InvalidResponseError, parse_response
from bench.report import print_progress
from bench.scenarios import Scenario
from bench.systems import OURS, PEER, EmulatedPlatform, StartError

MODELS = ("tiny", "1gb")
CACHES = ("cold", "warm")
# Options of the emulator with which the first job in the queue makes the autoscaler start a worker.
SCALED_FROM_ZERO = ("--workers-min=0", "--scaler-type=REQUEST_COUNT", "--scaler-value=1")
_JOB = Scenario(clients=1, tokens=16)
_POLL_S = 0.5
_LOG_PREFIX = "Cold start "
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass
class ColdStart:
    """One start.

    Args:
        first_token_s: from the worker's start to the first text at the client.
        ready_s: from the worker's start to its first poll for jobs.
        phases_s: the phases of the start, if the worker logs them.
    """

    first_token_s: float
    ready_s: float
    phases_s: dict[str, float] = field(default_factory=dict)


def run(model: str, cache: str, rounds: int, peer: Path | None, out: Path) -> int:
    """Measure starts of this worker and of the peer in turn; print and write the results; return the exit code."""
    path = synthetic_model.synthetic_model() if model == "1gb" else systems.tiny_model()
    names = [OURS] if peer is None else [OURS, PEER]
    starts: dict[str, list[ColdStart | None]] = {name: [] for name in names}
    errors: list[str] = []
    # What a cold start reads from disk, in addition to Python and its packages.
    evicted = [path, *([] if peer is None else [peer])] if cache == "cold" else []
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            start = None
            try:
                start = uvloop.run(_start(name, path, peer, evicted, out / "logs"))
                print_progress(f"Round {number + 1} of {rounds}: {name}, first token after {start.first_token_s:.2f} s")
            except (StartError, InvalidResponseError, OSError, RuntimeError, LookupError, HTTPException) as error:
                errors.append(f"{name}: {error}")
                print_progress(errors[-1])
            starts[name].append(start)
    conditions = {
        **environment.hardware(),
        **environment.versions(peer),
        "model": f"{model} ({_weights_mib(path):.0f} MiB of weights)",
        "file cache": eviction_method() if evicted else "warm",
        "rounds": str(rounds),
    }
    target = goals.cold_start_target(ratios(starts), model, cache)
    lines = [
        *(f"{key}: {value}" for key, value in conditions.items()),
        "",
        *table(starts),
        *(f"  error: {error}" for error in errors),
        "",
        *goals.target_lines([target], rounds),
    ]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    document = {
        "environment": conditions,
        "starts": {name: [start and asdict(start) for start in of_system] for name, of_system in starts.items()},
        "errors": errors,
        "targets": [{**asdict(target), "verdict": target.verdict}],
    }
    report.write_json(out / f"cold-{model}-{cache}.json", document)
    report.write_text(out / f"cold-{model}-{cache}.txt", text)
    return 0 if any(start for of_system in starts.values() for start in of_system) else 1


def ratios(starts: dict[str, list[ColdStart | None]]) -> list[float]:
    """Return the ratio of this worker's time to first token to the peer's, of each round in which both started."""
    return [
        ours.first_token_s / peers.first_token_s
        for ours, peers in zip(starts.get(OURS, []), starts.get(PEER, []), strict=False)
        if ours and peers
    ]


def table(starts: dict[str, list[ColdStart | None]]) -> list[str]:
    """Return the medians with minimum and maximum, and this worker's phases if it has logged them."""
    lines = [f"{'seconds after the exec':24}" + "".join(f"{name:>26}" for name in starts)]
    succeeded = {name: [start for start in of_system if start] for name, of_system in starts.items()}
    for label, values in (
        ("first token", [[start.first_token_s for start in of_system] for of_system in succeeded.values()]),
        ("ready", [[start.ready_s for start in of_system] for of_system in succeeded.values()]),
    ):
        lines.append(f"{label:24}" + "".join(f"{report.format_spread(column):>26}" for column in values))
    phases = dict.fromkeys(phase for start in succeeded.get(OURS, []) for phase in start.phases_s)
    for phase in phases:
        values_s = [start.phases_s[phase] for start in succeeded[OURS] if phase in start.phases_s]
        lines.append(f"{'  ' + phase:24}{report.format_number(median(values_s)):>26}")
    return lines


def read_phases(log: Iterable[str]) -> dict[str, float]:
    """Return the phases of a start in seconds from the log line `Cold start {"total_s": ..., "phases_s": {...}}`."""
    for line in log:
        _, found, rest = line.partition(_LOG_PREFIX)
        if found and rest.startswith("{"):
            try:
                phases = json.loads(rest)["phases_s"]
                return {str(name): float(seconds) for name, seconds in phases.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return {}


async def _start(name: str, model: Path, peer: Path | None, evicted: Sequence[Path], logs: Path) -> ColdStart:
    """Measure one start of one worker; `evicted` directories are removed from the file cache before it."""
    setup = systems.stock_setup(model, gpu=environment.gpu() is not None)
    worker: AbstractContextManager[list[str]] = nullcontext(systems.worker_options(setup))
    if name == PEER and peer is not None:
        worker = systems.peer_options(setup, logs, checkout=peer)
    with worker as options, systems.emulator(name, [*SCALED_FROM_ZERO, *options], logs) as (platform, _):
        # After the emulator's own start, which reads Python and packages that the worker reads as well.
        if evicted:
            drop_file_cache(evicted)
        return await first_token(platform)


async def first_token(platform: EmulatedPlatform, timeout_s: float = systems.START_TIMEOUT_S) -> ColdStart:
    """Submit a job to an emulator without workers (`SCALED_FROM_ZERO`), and wait for its response.

    Raises:
        StartError: the worker has exited.
        InvalidResponseError: the job failed, or its response did not come in time.
    """
    offset_s = time.time() - time.monotonic()
    request = asyncio.create_task(send(platform.address, _JOB.body(), timeout_s=timeout_s))
    while not request.done():
        await asyncio.wait({request}, timeout=_POLL_S)
        if platform.state()["gone"]:
            request.cancel()
            await asyncio.wait({request})
            platform.worker()
    trace = request.result()
    response = parse_response(trace, _JOB)
    worker = platform.worker()
    first_token_s = trace.due_s + response.chunks[0].time_s + offset_s - worker["startedAt"]
    return ColdStart(first_token_s, worker["readyAt"] - worker["startedAt"], read_phases(worker["log"]))


def eviction_method() -> str:
    """Return how `drop_file_cache` works on this machine."""
    if os.access(_DROP_CACHES, os.W_OK):
        return f"cold: {_DROP_CACHES}"
    return "cold: posix_fadvise(DONTNEED) on Python, its packages, the model and the peer"


def drop_file_cache(directories: Sequence[Path]) -> None:
    """Remove files from the kernel's file cache.

    As root, drop the complete cache; otherwise evict each file of Python, its packages and these directories. Both
    leave pages that running processes have mapped: the interpreter and a few libraries, but not torch, which neither
    the bench nor the emulator imports.
    """
    os.sync()
    if os.access(_DROP_CACHES, os.W_OK):
        _DROP_CACHES.write_text("1\n", encoding="ascii")
        return
    paths = sysconfig.get_paths()
    for directory in {Path(paths["stdlib"]), Path(paths["purelib"]), Path(paths["platlib"]), *directories}:
        for file in directory.rglob("*"):
            if file.is_file():
                _evict(file)


def _evict(file: Path) -> None:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _weights_mib(model: Path) -> float:
    return sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2**20
