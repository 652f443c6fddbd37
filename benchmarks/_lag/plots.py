"""The plots of the page: held-out success against updates and wall time, and the time of an update."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from benchmarks._lag.plan import LATENCIES_MS, SETTINGS
from benchmarks._lag.results import Cell, Results
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_COLOURS = dict(
    zip([setting.name for setting in SETTINGS], ("#7f8c99", "#e0a458", "#3a7ca5", "#6a994e", "#a44a3f"), strict=True)
)


def draw_success(results: Results, path: Path) -> None:
    """Curves with their 95 % intervals: a row against updates, a row against seconds, a column for each latency."""
    figure, grid = plt.subplots(2, len(LATENCIES_MS), figsize=(13, 7.5), dpi=100, sharey=True, squeeze=False)
    for column, latency_ms in enumerate(LATENCIES_MS):
        cells = [cell for cell in results.cells if cell.latency_ms == latency_ms]
        for cell in cells:
            _draw_curve(grid[0][column], cell, [float(update) for update in cell.curve])
            _draw_curve(grid[1][column], cell, [at_s for at_s, _ in cell.curve.values()])
        grid[0][column].set_title(f"tools of {latency_ms} ms")
        grid[0][column].set_xlabel("policy updates")
        grid[1][column].set_xlabel("seconds since the first rollout")
    for row in grid:
        row[0].set_ylabel("held-out success")
    if results.cells:
        grid[0][0].legend(frameon=False, loc="lower right")
    _save(figure, path)


def draw_time(results: Results, path: Path) -> None:
    """Seconds an update by setting and latency, with the ideal as a line across each bar."""
    figure, axes = plt.subplots(figsize=(9, 4), dpi=100)
    width = 0.8 / len(SETTINGS)
    for position, setting in enumerate(SETTINGS):
        cells = [cell for cell in results.cells if cell.setting == setting]
        places = [LATENCIES_MS.index(cell.latency_ms) + (position - 2) * width for cell in cells]
        heights = [cell.timing.mean_s for cell in cells]
        axes.bar(places, heights, width * 0.9, color=_COLOURS[setting.name], label=setting.name)
        for place, cell in zip(places, cells, strict=True):
            if (ideal := results.ideal(cell)) is not None:
                axes.hlines(ideal, place - width / 2, place + width / 2, color="black", linewidth=1.5)
    axes.set_xticks(range(len(LATENCIES_MS)), [f"tools of {ms} ms" for ms in LATENCIES_MS])
    axes.set_ylabel("seconds an update (line: ideal)")
    if results.cells:
        axes.legend(frameon=False)
    _save(figure, path)


def _draw_curve(axes: Axes, cell: Cell, places: list[float]) -> None:
    rates = [rate for _, rate in cell.curve.values()]
    colour = _COLOURS[cell.setting.name]
    axes.plot(places, [rate.rate for rate in rates], marker=".", color=colour, label=cell.setting.name)
    axes.fill_between(places, [rate.low for rate in rates], [rate.high for rate in rates], color=colour, alpha=0.1)
    axes.grid(alpha=0.3)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
