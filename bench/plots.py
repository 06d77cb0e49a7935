"""Plots by the number of clients, as PNG and SVG."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.compare import Results
from bench.report import write_atomically
from bench.scenarios import Scenario
from bench.systems import OURS, PEER, VLLM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The same colour for a system in all plots; the colours differ in brightness, too.
_COLOURS = {VLLM: "#7f7f7f", OURS: "#0b5fa5", PEER: "#d9822b"}
_PLOTS = {
    "throughput": ("Requests per second", ("requests_per_s",)),
    "ttft": ("Time to first token, ms", ("ttft_p50_ms", "ttft_p95_ms")),
    "itl": ("Inter-token latency per token, ms", ("itl_p50_ms", "itl_p95_ms")),
}
_STYLES = {"p50": "-", "p95": "--"}


def write_plots(results: Results, directory: Path) -> list[Path]:
    """Write a plot each of throughput, TTFT and ITL; return the files, none if no closed loop was measured."""
    by_clients = {
        scenario.clients: scenario
        for scenario in results.scenarios
        if scenario == Scenario(clients=scenario.clients) and scenario.clients
    }
    if not by_clients:
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    files = []
    for name, (title, metrics) in _PLOTS.items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for system in results.systems:
            for metric in metrics:
                _draw(axes, results, by_clients, system, metric)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(by_clients), [str(count) for count in sorted(by_clients)])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Clients")
        axes.set_ylabel(title)
        axes.set_title("Streamed responses of 64 tokens; median, minimum and maximum of the rounds", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend()
        for suffix in (".png", ".svg"):
            path = directory / f"{name}{suffix}"
            write_atomically(path, partial(figure.savefig, dpi=150))
            files.append(path)
        plt.close(figure)
    return files


def _draw(axes: Axes, results: Results, by_clients: dict[int, Scenario], system: str, metric: str) -> None:
    """Draw one line, with a band from the minimum to the maximum of the rounds."""
    points = {clients: results.values(scenario, system, metric) for clients, scenario in sorted(by_clients.items())}
    points = {clients: values for clients, values in points.items() if values}
    share = next((share for share in _STYLES if share in metric), "")
    colour = _COLOURS[system]
    medians = [median(values) for values in points.values()]
    label = f"{system} {share}".strip()
    axes.plot(list(points), medians, _STYLES.get(share, "-"), color=colour, marker="o", label=label)
    if share != "p95":
        low, high = ([pick(values) for values in points.values()] for pick in (min, max))
        axes.fill_between(list(points), low, high, color=colour, alpha=0.15, linewidth=0)
