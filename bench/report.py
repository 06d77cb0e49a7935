"""The results as a table for people and as JSON for programs, and the progress of a run.

A result file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench import goals
from bench import metrics as definitions
from bench.compare import Results
from bench.metrics import METRICS
from bench.scenarios import Scenario
from bench.systems import OURS, PEER, VLLM

_LABEL_WIDTH = 26
_WIDTH = 28
_RATIO_WIDTH = 11
# A ratio of these says nothing: they are counts, or describe the bench itself.
_NO_RATIO = {"requests", "errors", "client_cpu_cores"}


def print_progress(line: str) -> None:
    """Print a line to stderr at once; stdout has only the results."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def render_text(results: Results, environment: Mapping[str, str], rounds: int) -> str:
    """Return the complete text report: environment, definitions of the metrics, a table per scenario, targets."""
    capacity = results.capacity_requests_per_s
    parts = [
        "\n".join(f"{name}: {value}" for name, value in environment.items()),
        (definitions.__doc__ or "").strip(),
        *([f"Capacity: vLLM alone served {format_number(capacity)} requests/s."] if capacity else []),
        f"Medians of {rounds} rounds (minimum .. maximum); a ratio is the median of the rounds' ratios.",
        *(table(results, scenario) for scenario in results.scenarios),
        "\n".join(goals.target_lines(goals.load_targets(results), rounds)),
    ]
    return "\n\n".join(parts) + "\n"


def to_document(results: Results, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return everything as a JSON document, including the metrics and errors of each round."""
    return {
        "environment": dict(environment),
        "metrics": METRICS,
        "capacity_requests_per_s": results.capacity_requests_per_s,
        "scenarios": scenarios_document(results),
        "targets": [{**asdict(it), "verdict": it.verdict} for it in goals.load_targets(results)],
    }


def scenarios_document(results: Results) -> list[dict[str, Any]]:
    """Return each scenario with the metrics and errors of each round, and this worker's ratios to the others."""
    return [
        {
            "name": scenario.name,
            **asdict(scenario),
            "systems": {
                system: [asdict(measurement) for measurement in results.rounds[scenario][system]]
                for system in results.systems
            },
            "ratios": {
                f"{OURS} / {other}": {
                    metric: results.ratio(scenario, metric, OURS, other)
                    for metric in METRICS
                    if metric not in _NO_RATIO
                }
                for other in _baselines(results)
            },
        }
        for scenario in results.scenarios
    ]


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document."""
    write_text(path, json.dumps(document, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same directory, then rename that file to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.temporary{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def table(results: Results, scenario: Scenario, metrics: Sequence[str] = tuple(METRICS)) -> str:
    """Return one scenario: a row per metric, a column per system, and this worker's ratios to the others."""
    baselines = _baselines(results)
    header = "".join(f"{system:>{_WIDTH}}" for system in results.systems)
    ratio_header = "".join(f"{'/ ' + other:>{max(_RATIO_WIDTH, len(other) + 4)}}" for other in baselines)
    rows = [scenario.name, f"{'':{_LABEL_WIDTH}}{header}{ratio_header}"]
    for metric in metrics:
        columns = [results.values(scenario, system, metric) for system in results.systems]
        if not any(columns):
            continue
        row = f"{METRICS[metric]:{_LABEL_WIDTH}}" + "".join(f"{format_spread(values):>{_WIDTH}}" for values in columns)
        for other in baselines if metric not in _NO_RATIO else []:
            ratio = results.ratio(scenario, metric, OURS, other)
            row += f"{'-' if ratio is None else f'{ratio:.2f}':>{max(_RATIO_WIDTH, len(other) + 4)}}"
        rows.append(row)
    for system in results.systems:
        rows += [f"  {system}: {count} x {kind}" for kind, count in results.errors(scenario, system).items()]
    return "\n".join(row.rstrip() for row in rows)


def _baselines(results: Results) -> list[str]:
    """Return the systems that this worker is compared with."""
    return [system for system in (VLLM, PEER) if system in results.systems and OURS in results.systems]


def format_spread(values: Sequence[float]) -> str:
    """Return the median with the minimum and the maximum; a dash if there are no values."""
    if not values:
        return "-"
    return f"{format_number(median(values))} ({format_number(min(values))} .. {format_number(max(values))})"


def format_number(value: float) -> str:
    """Return three significant digits, at most four decimal places, and no exponent."""
    if value == int(value) or abs(value) >= 100:  # noqa: PLR2004 (three digits)
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.4f}"  # noqa: PLR2004 (no exponent, and no more places)
