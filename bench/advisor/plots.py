"""Plots of the advisor, as SVG or PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench.advisor.search import Goal, Result, frontier
from bench.advisor.simulation import Sample
from bench.report import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"QUEUE_DELAY": "#0b5fa5", "REQUEST_COUNT": "#d9822b"}
_GREY = "#7f7f7f"
_HOUR_S = 3600.0


def write_frontier(results: Sequence[Result], goal: Goal, path: Path) -> None:
    """Draw each result by what it costs and how long its users wait, the frontier, and the goal."""
    with_money = results[0].money is not None

    def draw(axes: Sequence[Axes]) -> None:
        (plot,) = axes
        for scaler, colour in _COLOURS.items():
            of_scaler = [result for result in results if result.plan.scaler_type == scaler]
            costs = [_cost(result) for result in of_scaler]
            plot.scatter(costs, [result.ttft_s[goal.share] for result in of_scaler], s=12, color=colour, label=scaler)
        best = frontier(results, goal.share)
        costs = [_cost(result) for result in best]
        times_s = [result.ttft_s[goal.share] for result in best]
        plot.step(costs, times_s, where="post", color="black", linewidth=1, label="frontier")
        plot.axhline(goal.seconds, color=_GREY, linestyle="--", linewidth=1, label=f"goal: {goal.seconds:g} s")
        if all(result.ttft_s[goal.share] for result in results):
            plot.set_yscale("log")
        else:  # A logarithmic axis has no 0.
            plot.set_yscale("symlog", linthresh=0.01)
            plot.set_ylim(bottom=0)
        plot.set_xlabel("USD" if with_money else "GPU hours")
        plot.set_ylabel(f"Time to first token p{goal.share}, s")
        plot.legend(fontsize=8)

    _write(path, 1, draw, (6.5, 4.0))


def _cost(result: Result) -> float:
    return result.outcome.gpu_s / _HOUR_S if result.money is None else result.money


def write_timelines(timelines: Mapping[str, Mapping[str, Sequence[Sample]]], path: Path) -> None:
    """Draw requests in the queue and workers over a day, one column a title and one line a label."""

    def draw(axes: Sequence[Axes]) -> None:
        count = len(timelines)
        for column, (title, lines) in enumerate(timelines.items()):
            waiting, workers = axes[column], axes[count + column]
            for (label, samples), colour in zip(lines.items(), ("#0b5fa5", "#5aa9e6", "#d9822b"), strict=False):
                hours = [sample.time_s / _HOUR_S for sample in samples]
                waiting.plot(hours, [sample.waiting for sample in samples], color=colour, linewidth=1, label=label)
                workers.plot(hours, [sample.workers for sample in samples], color=colour, linewidth=1)
            waiting.set_yscale("symlog", linthresh=10)
            waiting.set_ylim(bottom=0)
            waiting.set_title(title, fontsize=9)
            workers.set_ylim(bottom=0)
            workers.set_xlabel("Hour")
        axes[0].set_ylabel("Requests in the queue")
        axes[count].set_ylabel("Workers")
        axes[0].legend(fontsize=7)

    _write(path, 2, draw, (3.2 * len(timelines), 4.6), columns=len(timelines))


def _write(
    path: Path, rows: int, draw: Callable[[Sequence[Axes]], None], size: tuple[float, float], columns: int = 1
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    # The same file for the same data: ids by a fixed salt, no date. Letters as text make it small.
    mpl.rcParams.update({"svg.hashsalt": "advise", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    figure: Figure
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    axes: list[Axes] = list(grid.flat)
    for one in axes:
        one.grid(alpha=0.3)
    draw(axes)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    write_atomically(path, partial(figure.savefig, dpi=120, metadata=metadata))
    plt.close(figure)
