"""Measure a machine with one GPU in one command: right answers, starts, load, and phi-4's shape in 4 bits.

It takes at most the time budget; stages that no longer fit are skipped, and the results are written after each one. On
a machine without a GPU it is a rehearsal: the same stages with small models and few clients. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench import environment, report, systems
from bench.gpu_stages import GPU, REHEARSAL, Bench
from bench.report import print_progress
from bench.stages import Budget, Outcome, run_stages

_BUDGET_S = 480.0
_LOG_LINES = 300


def add_options(result: argparse.ArgumentParser) -> None:
    """Add the options of this command; `--peer` and `--out` may also be given before it."""
    result.add_argument(
        "--budget-s", type=float, default=_BUDGET_S, metavar="S", help="time for everything (default: 480)"
    )
    result.add_argument(
        "--stages", nargs="+", choices=list(GPU.needs_s), metavar="STAGE", help=f"of {', '.join(GPU.needs_s)}"
    )
    result.add_argument("--rehearse", action="store_true", help="rehearse, although there is a GPU")
    result.add_argument(
        "--tiny", type=_model, metavar="DIR", help="the trained tiny model (default: the cached one, or train it)"
    )
    result.add_argument(
        "--peer", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="a checkout of worker-vllm to compare with"
    )
    result.add_argument(
        "--out",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="directory of gpu.json, gpu.txt and, if something has failed, gpu-logs.txt (default: bench-results)",
    )


def _model(text: str) -> Path:
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no model: it has no config.json")
    return Path(text).resolve()


def run(arguments: argparse.Namespace) -> int:
    """Run the stages; print and write the results; return the exit code: 0 if each one was completed, otherwise 1."""
    budget = Budget(arguments.budget_s)
    rehearsal = arguments.rehearse or environment.gpu() is None
    out: Path = arguments.out
    conditions = {
        **environment.hardware(),
        **environment.versions(arguments.peer),
        "date": time.strftime("%d %B %Y, %H:%M UTC", time.gmtime()),
        "kind": "a rehearsal with small models: its figures mean nothing" if rehearsal else "a measurement",
    }

    def write(outcomes: Sequence[Outcome]) -> None:
        report.write_json(
            out / "gpu.json", {"environment": conditions, "stages": [asdict(outcome) for outcome in outcomes]}
        )
        report.write_text(out / "gpu.txt", render(conditions, outcomes))
        if logs := [line for outcome in outcomes for line in _log(outcome)]:
            report.write_text(out / "gpu-logs.txt", "\n".join(logs) + "\n")

    # Results of an earlier run must not be taken for those of a run that does not come this far.
    for name in ("gpu.json", "gpu.txt", "gpu-logs.txt"):
        (out / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as work:
        tiny: Path = arguments.tiny or systems.tiny_model()
        bench = Bench(REHEARSAL if rehearsal else GPU, budget, tiny, arguments.peer, Path(work))
        stages = [stage for stage in bench.stages() if not arguments.stages or stage.name in arguments.stages]
        outcomes = run_stages(stages, budget, write)
    sys.stdout.write(render(conditions, outcomes))
    print_progress(f"Wrote {out / 'gpu.json'} and {out / 'gpu.txt'}")
    return 0 if all(outcome.state == "done" for outcome in outcomes) else 1


def render(conditions: Mapping[str, str], outcomes: Sequence[Outcome]) -> str:
    """Return the report for people: the machine and versions, then a section for each stage."""
    parts = ["\n".join(f"{name}: {value}" for name, value in conditions.items())]
    for outcome in outcomes:
        reason = f" ({outcome.reason})" if outcome.reason else ""
        heading = f"{outcome.stage}: {outcome.title}: {outcome.state}{reason}, {outcome.seconds:.0f} s"
        parts.append("\n".join([heading, *(f"  {line}".rstrip() for line in outcome.lines)]))
    return "\n\n".join(parts) + "\n"


def _log(outcome: Outcome) -> list[str]:
    """Return the end of a stage's log under a heading; nothing if it has none."""
    return [f"== {outcome.stage}", *outcome.log[-_LOG_LINES:]] if outcome.log else []
