"""Plots by the number of clients, as PNG and SVG."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.compare import Results
from bench.report import write_whole
from bench.scenarios import Scenario
from bench.systems import OURS, PEER, VLLM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One colour a server in all plots; they differ in brightness, too.
_COLOURS = {VLLM: "#7f7f7f", OURS: "#0b5fa5", PEER: "#d9822b"}
_PLOTS = {
    "throughput": ("Requests a second", ("requests_per_s",)),
    "ttft": ("Time to first token, ms", ("ttft_p50_ms", "ttft_p95_ms")),
    "itl": ("Inter-token latency per token, ms", ("itl_p50_ms", "itl_p95_ms")),
}
_STYLES = {"p50": "-", "p95": "--"}


def write_plots(results: Results, directory: Path) -> list[Path]:
    """Write a plot for each of throughput, TTFT and ITL; return the files, none if no closed loop was measured."""
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
    for name, (title, figures) in _PLOTS.items():
        drawing, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for server in results.servers:
            for figure in figures:
                _draw(axes, results, by_clients, server, figure)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(by_clients), [str(count) for count in sorted(by_clients)])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Clients")
        axes.set_ylabel(title)
        axes.set_title("Streamed answers of 64 tokens; medians, least and greatest of the rounds", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend()
        for ending in (".png", ".svg"):
            path = directory / f"{name}{ending}"
            write_whole(path, partial(drawing.savefig, dpi=150))
            files.append(path)
        plt.close(drawing)
    return files


def _draw(axes: Axes, results: Results, by_clients: dict[int, Scenario], server: str, figure: str) -> None:
    """One line, with a band from the least to the greatest of the rounds."""
    found = {clients: results.values(scenario, server, figure) for clients, scenario in sorted(by_clients.items())}
    found = {clients: values for clients, values in found.items() if values}
    share = next((share for share in _STYLES if share in figure), "")
    colour = _COLOURS[server]
    middle = [median(values) for values in found.values()]
    axes.plot(list(found), middle, _STYLES.get(share, "-"), color=colour, marker="o", label=f"{server} {share}".strip())
    if share != "p95":
        least, greatest = ([pick(values) for values in found.values()] for pick in (min, max))
        axes.fill_between(list(found), least, greatest, color=colour, alpha=0.15, linewidth=0)
