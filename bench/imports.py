"""`python -m bench imports`: what a worker imports from its exec to its first answer, by package, and what it costs.

`bench.import_log` records it in all processes of the worker. That makes a start slower, by about 0.3 s here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from pathlib import Path

import uvloop

from bench import environment, report, systems
from bench.clients import send
from bench.metrics import InvalidResponseError, parse_response
from bench.scenarios import Scenario
from bench.systems import ROOT, StartError

LOG_VARIABLE = "IMPORT_LOG"
LOG_DIRECTORY = ROOT / "bench" / "import_log"
_JOB = Scenario(clients=1, tokens=16)
_MAX_ROWS = 30


@dataclass(frozen=True)
class Record:
    """One module that one process imported from a file; a line of the log.

    Args:
        process: its id.
        module: the full name.
        compiled: whether its source had to be compiled, as there was no valid bytecode.
        own_s: without the modules that it imports.
        own_bytes: by how much the resident memory grew, without the modules that it imports.
    """

    process: int
    module: str
    compiled: bool
    own_s: float
    own_bytes: int

    @property
    def package(self) -> str:
        """The top-level package."""
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Cost:
    """What the modules of one package cost together."""

    package: str
    modules: int
    compiled: int
    own_s: float
    own_bytes: int


def log_environment(log: Path) -> dict[str, str]:
    """Return the variables that let a worker write this log."""
    return {"PYTHONPATH": str(LOG_DIRECTORY), LOG_VARIABLE: str(log)}


def read_log(log: Path) -> list[Record]:
    """Return the records of a log, in order."""
    return [Record(**json.loads(line)) for line in log.read_text(encoding="utf-8").splitlines()]


def costs(records: Iterable[Record]) -> list[Cost]:
    """Return the cost of each top-level package, the most expensive first."""
    packages: dict[str, list[Record]] = {}
    for record in records:
        packages.setdefault(record.package, []).append(record)
    return sorted((_cost(package, of_package) for package, of_package in packages.items()), key=lambda one: -one.own_s)


def _cost(name: str, records: Sequence[Record]) -> Cost:
    return Cost(
        name,
        len(records),
        sum(record.compiled for record in records),
        sum(record.own_s for record in records),
        sum(record.own_bytes for record in records),
    )


def table(records: Sequence[Record], worker: int) -> list[str]:
    """Return the packages that the worker's process imported, and what its other processes imported in total.

    Args:
        records: of all processes.
        worker: id of the worker's process.
    """
    own = [record for record in records if record.process == worker]
    packages = costs(own)
    rest = packages[_MAX_ROWS:]
    rows = packages[:_MAX_ROWS]
    if rest:
        names = {cost.package for cost in rest}
        rows.append(_cost(f"{len(rest)} others", [record for record in own if record.package in names]))
    rows.append(_cost("total", own))
    rows.append(_cost("other processes", [record for record in records if record.process != worker]))
    heading = f"{'package':28}{'modules':>10}{'compiled':>10}{'own ms':>10}{'own MiB':>10}"
    return [
        heading,
        *(
            f"{one.package:28}{one.modules:>10}{one.compiled:>10}{one.own_s * 1e3:>10.0f}{one.own_bytes / 2**20:>10.1f}"
            for one in rows
        ),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--out",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="directory of the results (default: bench-results)",
    )


def run(out: Path) -> int:
    """Let a worker with the tiny model answer a job, and print and write its imports; return the exit code."""
    gpu = environment.gpu() is not None
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "imports.jsonl"
        try:
            setup = replace(systems.stock_setup(systems.tiny_model(), gpu=gpu), environment=log_environment(log))
            with systems.this_worker(setup, out / "logs") as system:
                trace = uvloop.run(send(system.address, _JOB.body()))
                parse_response(trace, _JOB)
                worker = system.process.pid
        except (StartError, InvalidResponseError, OSError, HTTPException) as error:
            sys.stderr.write(f"Nothing was measured: {error}\n")
            return 1
        records = read_log(log)
    conditions = environment.hardware() | environment.versions(None)
    lines = [*(f"{key}: {value}" for key, value in conditions.items()), "", *table(records, worker)]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    document = {
        "environment": conditions,
        "packages": [asdict(cost) for cost in costs(record for record in records if record.process == worker)],
        "modules": [asdict(record) for record in records],
    }
    report.write_json(out / "imports.json", document)
    report.write_text(out / "imports.txt", text)
    return 0
