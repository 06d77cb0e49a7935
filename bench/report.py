"""The table that people read and the JSON that programs read; files take their names only when they are whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench import goals, metrics
from bench.compare import Results
from bench.metrics import FIGURES
from bench.scenarios import Scenario
from bench.systems import OURS, PEER, VLLM

_NAME_WIDTH = 26
_WIDTH = 28
_RATIO_WIDTH = 11
# Ratios that say nothing: counts, and what only the bench itself is.
_NO_RATIO = {"requests", "errors", "client_cpu"}


def text(results: Results, about: Mapping[str, str], rounds: int) -> str:
    """All that a reader wants: the machine, the meaning of the figures, a table a scenario, the targets."""
    parts = [
        "\n".join(f"{name}: {value}" for name, value in about.items()),
        (metrics.__doc__ or "").strip(),
        *([f"Capacity: vLLM alone served {number(results.capacity)} requests/s."] if results.capacity else []),
        f"Medians over {rounds} rounds (least .. greatest); ratios are medians of the rounds' own ratios.",
        *(_table(results, scenario) for scenario in results.scenarios),
        "\n".join(goals.lines(goals.speed_targets(results), rounds)),
    ]
    return "\n\n".join(parts) + "\n"


def document(results: Results, about: Mapping[str, str]) -> dict[str, Any]:
    """Everything, each round's figures and errors included."""
    return {
        "about": dict(about),
        "figures": FIGURES,
        "capacity_requests_per_s": results.capacity,
        "scenarios": [
            {
                "name": scenario.name,
                **asdict(scenario),
                "servers": {
                    server: [asdict(measured) for measured in results.rounds[scenario][server]]
                    for server in results.servers
                },
                "ratios": {
                    f"{OURS} / {other}": {
                        figure: results.ratio(scenario, figure, OURS, other) for figure in FIGURES if _has_ratio(figure)
                    }
                    for other in _others(results)
                },
            }
            for scenario in results.scenarios
        ],
        "targets": [{**asdict(it), "verdict": it.verdict} for it in goals.speed_targets(results)],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON document."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text."""
    write_whole(path, lambda unfinished: unfinished.write_text(content, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file that takes its name once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished{path.suffix}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _table(results: Results, scenario: Scenario) -> str:
    """One scenario: a row a figure, a column a server, and this worker's ratios to the others."""
    others = _others(results)
    heads = "".join(f"{server:>{_WIDTH}}" for server in results.servers)
    ratios = "".join(f"{'/ ' + other:>{max(_RATIO_WIDTH, len(other) + 4)}}" for other in others)
    rows = [scenario.name, f"{'':{_NAME_WIDTH}}{heads}{ratios}"]
    for figure, told in FIGURES.items():
        columns = [results.values(scenario, server, figure) for server in results.servers]
        if not any(columns):
            continue
        row = f"{told:{_NAME_WIDTH}}" + "".join(f"{spread(values):>{_WIDTH}}" for values in columns)
        for other in others if _has_ratio(figure) else []:
            ratio = results.ratio(scenario, figure, OURS, other)
            row += f"{'-' if ratio is None else f'{ratio:.2f}':>{max(_RATIO_WIDTH, len(other) + 4)}}"
        rows.append(row)
    for server in results.servers:
        rows += [f"  {server}: {count} x {kind}" for kind, count in results.errors(scenario, server).items()]
    return "\n".join(row.rstrip() for row in rows)


def _has_ratio(figure: str) -> bool:
    return figure not in _NO_RATIO


def _others(results: Results) -> list[str]:
    return [server for server in (VLLM, PEER) if server in results.servers and OURS in results.servers]


def spread(values: Sequence[float]) -> str:
    """The median, with the least and the greatest; a dash where there is nothing."""
    if not values:
        return "-"
    return f"{number(median(values))} ({number(min(values))} .. {number(max(values))})"


def number(value: float) -> str:
    """Three digits that count, four decimal places at most, and no exponent."""
    if value == int(value) or abs(value) >= 100:  # noqa: PLR2004 (three digits)
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.4f}"  # noqa: PLR2004 (no exponent, and no more places)
