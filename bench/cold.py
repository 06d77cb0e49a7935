"""`python -m bench cold`: from the worker's exec to the first token of a job that is waiting already.

For each start there is a fresh emulator without a worker. A streamed chat of 16 tokens is submitted to it; the queue
has a worker started; the clock runs from the worker's start to the first text that the client sees. That start is the
emulator's `startedAt`, taken just before it starts the worker's launcher: the exec follows some 30 ms later, the same
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
from pathlib import Path
from statistics import median

import uvloop

from bench import environment, goals, report, synthetic_model, systems
from bench.clients import ask
from bench.metrics import FaultyAnswerError, read_answer
from bench.scenarios import Scenario
from bench.systems import OURS, PEER, Platform, ServerError

MODELS = ("tiny", "1gb")
CACHES = ("cold", "warm")
_JOB = Scenario(clients=1, tokens=16)
_POLL_S = 0.1
_PHASES = "Cold start "
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass
class Start:
    """One start.

    Args:
        first_token_s: from the worker's start to the first text at the client.
        ready_s: from the worker's start to its first call for jobs.
        phases_s: what the worker's log says about its start, if it does.
    """

    first_token_s: float
    ready_s: float
    phases_s: dict[str, float] = field(default_factory=dict)


def run(model: str, cache: str, rounds: int, peer: Path | None, out: Path) -> int:
    """Measure starts of this worker and of the peer in turn, print and write what was found; return the exit code."""
    path = str(synthetic_model.made_up_model()) if model == "1gb" else systems.tiny_model()
    names = [OURS] if peer is None else [OURS, PEER]
    found: dict[str, list[Start | None]] = {name: [] for name in names}
    errors: list[str] = []
    # What a cold start reads from the disk: Python and its packages are among it for each worker.
    files = [Path(path), *([] if peer is None else [peer])] if cache == "cold" else []
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            try:
                start = uvloop.run(_start(name, path, peer, files, out / "logs"))
                _say(f"round {number + 1} of {rounds}: {name}, first token after {start.first_token_s:.2f} s")
            except (ServerError, FaultyAnswerError) as error:
                start = None
                errors.append(f"{name}: {error}")
                _say(errors[-1])
            found[name].append(start)
    about = {
        **environment.machine(),
        **environment.versions(peer),
        "model": f"{model} ({_size_mib(path):.0f} MiB of weights)",
        "file cache": how_emptied() if files else "warm",
        "rounds": str(rounds),
    }
    target = goals.cold_target(ratios(found), model, cache)
    lines = [
        *(f"{key}: {value}" for key, value in about.items()),
        "",
        *table(found),
        *(f"  error: {error}" for error in errors),
        "",
        *goals.lines([target], rounds),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    document = {
        "about": about,
        "starts": {name: [start and asdict(start) for start in starts] for name, starts in found.items()},
        "errors": errors,
        "targets": [{**asdict(target), "verdict": target.verdict}],
    }
    report.write_json(out / f"cold-{model}-{cache}.json", document)
    report.write_text(out / f"cold-{model}-{cache}.txt", "\n".join(lines) + "\n")
    return 0 if any(start for starts in found.values() for start in starts) else 1


def ratios(found: dict[str, list[Start | None]]) -> list[float]:
    """This worker's exec to first token by the peer's, in each round in which both have started."""
    return [
        ours.first_token_s / peers.first_token_s
        for ours, peers in zip(found.get(OURS, []), found.get(PEER, []), strict=False)
        if ours and peers
    ]


def table(found: dict[str, list[Start | None]]) -> list[str]:
    """The medians, with the least and the greatest; and the phases of this worker's start where it tells them."""
    lines = [f"{'seconds from the exec':24}" + "".join(f"{name:>26}" for name in found)]
    whole = {name: [start for start in starts if start] for name, starts in found.items()}
    for told, values in (
        ("to the first token", {name: [it.first_token_s for it in starts] for name, starts in whole.items()}),
        ("to ready", {name: [it.ready_s for it in starts] for name, starts in whole.items()}),
    ):
        lines.append(f"{told:24}" + "".join(f"{report.spread(column):>26}" for column in values.values()))
    names = dict.fromkeys(phase for start in whole.get(OURS, []) for phase in start.phases_s)
    for phase in names:
        values_s = [start.phases_s[phase] for start in whole[OURS] if phase in start.phases_s]
        lines.append(f"{'  ' + phase:24}{report.number(median(values_s)):>26}")
    return lines


def read_phases(log: Iterable[str]) -> dict[str, float]:
    """The phases of a start in seconds, from the worker's line `Cold start {"total_s": ..., "phases_s": {...}}`."""
    for line in log:
        _, found, rest = line.partition(_PHASES)
        if found and rest.startswith("{"):
            try:
                phases = json.loads(rest)["phases_s"]
                return {str(name): float(seconds) for name, seconds in phases.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return {}


async def _start(name: str, model: str, peer: Path | None, files: Sequence[Path], logs: Path) -> Start:
    """One start of one worker, in an emulator that has none yet; `files` is what the system is to forget before."""
    gpu = environment.gpu() is not None
    given: AbstractContextManager[list[str]] = nullcontext(systems.worker_options(model, gpu=gpu))
    if name == PEER and peer is not None:
        given = systems.peer_options(model, logs, gpu=gpu, checkout=peer)
    with given as options:
        # The first job that waits has a worker started.
        scaling = ["--workers-min=0", "--scaler-type=REQUEST_COUNT", "--scaler-value=1"]
        with systems.emulator(name, [*scaling, *options], logs) as (platform, _):
            # After the emulator's own start, which has read Python and packages that the worker reads as well.
            if files:
                empty_file_cache(files)
            return await _first_token(platform)


async def _first_token(platform: Platform) -> Start:
    """Submit a job to an emulator without a worker, and wait for its answer or for the worker's end."""
    offset = time.time() - time.monotonic()
    asked = asyncio.create_task(ask(systems.gateway(platform), _JOB.body(), limit_s=systems.START_S))
    while not asked.done():
        await asyncio.wait({asked}, timeout=_POLL_S * 5)
        if platform.state()["gone"]:
            asked.cancel()
            await asyncio.wait({asked})
            platform.worker()
    exchange = asked.result()
    answer = read_answer(exchange, _JOB)
    worker = platform.worker()
    first_token_s = exchange.due_s + answer.shown[0][0] + offset - worker["startedAt"]
    return Start(first_token_s, worker["readyAt"] - worker["startedAt"], read_phases(worker["log"]))


def how_emptied() -> str:
    """How `empty_file_cache` goes about it here."""
    if os.access(_DROP_CACHES, os.W_OK):
        return f"cold: {_DROP_CACHES}"
    return "cold: posix_fadvise(DONTNEED) on Python, its packages, the model and the peer"


def empty_file_cache(directories: Sequence[Path]) -> None:
    """Have the system forget what it has read of files.

    The whole cache where that is allowed (root); otherwise each file of Python, its packages and these directories is
    let go. Either way what running processes have mapped stays: the interpreter and few libraries, as nothing here
    imports torch.
    """
    os.sync()
    if os.access(_DROP_CACHES, os.W_OK):
        _DROP_CACHES.write_text("1\n", encoding="ascii")
        return
    paths = sysconfig.get_paths()
    for directory in {Path(paths["stdlib"]), Path(paths["purelib"]), Path(paths["platlib"]), *directories}:
        for file in directory.rglob("*"):
            if file.is_file():
                _let_go(file)


def _let_go(file: Path) -> None:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _size_mib(model: str) -> float:
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) / 2**20


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
