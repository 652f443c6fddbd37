"""Plots of a run, drawn by Matplotlib without a screen; what has no data is left out, never drawn as zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from palaestra.agents import EvalReport, Proportion

_SIZE = (8.0, 4.0)
_DPI = 110
_COLOURS = ("#9aa5b1", "#e0a458", "#3a7ca5", "#6a994e", "#a44a3f", "#7b5ea7")

Steps = Sequence[Mapping[str, Any]]


def draw_plots(folder: Path, evaluations: Sequence[EvalReport], steps: Steps) -> dict[str, Path]:
    """Write all plots that have data into `folder`; their files by title, in reading order."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Path] = {}
    if evaluations:
        plots["Held-out success by environment, 95 % intervals"] = _draw_success(folder / "success.png", evaluations)
    if steps:
        plots["Success in training rollouts"] = _draw_curves(
            folder / "training_success.png", steps, _by_key(steps, "success_by_env"), "success rate", (0, 1)
        )
        plots["Reward terms (contribution to the reward)"] = _draw_curves(
            folder / "reward_terms.png", steps, _by_key(steps, "terms"), "mean contribution"
        )
        lags = {"mean lag": _column(steps, "lag_mean"), "largest lag": _column(steps, "lag_max")}
        plots["Lag of trained groups"] = _draw_curves(folder / "lag.png", steps, lags, "policy versions")
        plots["Throughput"] = _draw_throughput(folder / "throughput.png", steps)
        uses = {name: _column(steps, f"use_{name}") for name in ("engine", "learner", "envs")}
        plots["Use of engine, learner and environments"] = _draw_curves(
            folder / "utilisation.png", steps, uses, "share of the step", (0, 1)
        )
        plots["Where the loop's time went"] = _draw_times(folder / "wall_time.png", steps)
    return plots


def _draw_success(path: Path, evaluations: Sequence[EvalReport]) -> Path:
    env_ids = sorted({env_id for report in evaluations for env_id in report.by_env})
    labels = ["suite", *(short_name(env_id) for env_id in env_ids)]
    figure, axes = plt.subplots(figsize=_SIZE, dpi=_DPI)
    width = 0.8 / len(evaluations)
    for position, report in enumerate(evaluations):
        named = [report.success, *(report.by_env.get(env_id) for env_id in env_ids)]
        shown = [(index, value) for index, value in enumerate(named) if value is not None and value.count]
        values = [value for _, value in shown]
        places = [index + (position - (len(evaluations) - 1) / 2) * width for index, _ in shown]
        heights = [value.rate for value in values]
        axes.bar(places, heights, width * 0.95, label=report.policy, color=_COLOURS[position % len(_COLOURS)])
        axes.errorbar(places, heights, yerr=_error_bars(values), fmt="none", ecolor="black", capsize=3, linewidth=1)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("success rate")
    return _finish(figure, axes, path)


def _error_bars(values: Sequence[Proportion]) -> list[list[float]]:
    below = [max(0.0, value.rate - value.low) for value in values]
    above = [max(0.0, value.high - value.rate) for value in values]
    return [below, above]


def _draw_curves(
    path: Path,
    steps: Steps,
    curves: Mapping[str, Sequence[float | None]],
    label: str,
    limits: tuple[float, float] | None = None,
) -> Path:
    figure, axes = plt.subplots(figsize=_SIZE, dpi=_DPI)
    numbers = [record["step"] for record in steps]
    for position, (name, values) in enumerate(curves.items()):
        points = [(x, y) for x, y in zip(numbers, values, strict=True) if y is not None]
        colour = _COLOURS[(position + 1) % len(_COLOURS)]
        axes.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name, color=colour)
    axes.set_xlabel("policy update")
    axes.set_ylabel(label)
    if limits is not None:
        axes.set_ylim(limits[0], limits[1] * 1.02)
    return _finish(figure, axes, path)


def _draw_throughput(path: Path, steps: Steps) -> Path:
    figure, axes = plt.subplots(figsize=_SIZE, dpi=_DPI)
    numbers = [record["step"] for record in steps]
    tokens = [record["num_sampled_tokens"] / max(record["wall_s"], 1e-9) for record in steps]
    episodes = [record["num_episodes"] / max(record["wall_s"], 1e-9) for record in steps]
    axes.plot(numbers, tokens, marker=".", color=_COLOURS[2], label="trained tokens per second")
    axes.set_ylabel("tokens per second")
    axes.set_xlabel("policy update")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.plot(numbers, episodes, marker=".", color=_COLOURS[1], label="trained episodes per second")
    right.set_ylabel("episodes per second")
    right.set_ylim(bottom=0)
    right.legend(loc="lower right", frameon=False)
    return _finish(figure, axes, path, location="lower left")


def _draw_times(path: Path, steps: Steps) -> Path:
    figure, axes = plt.subplots(figsize=_SIZE, dpi=_DPI)
    numbers = [record["step"] for record in steps]
    parts = [[record[key] for record in steps] for key in ("wait_s", "learn_s", "sync_s")]
    names = ("waiting for rollouts", "learning", "weight sync")
    axes.stackplot(numbers, *parts, labels=names, colors=_COLOURS[1:4])
    axes.set_xlabel("policy update")
    axes.set_ylabel("seconds")
    return _finish(figure, axes, path)


def _finish(figure: Figure, axes: Axes, path: Path, *, location: str = "best") -> Path:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc=location)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


def _column(steps: Steps, key: str) -> list[float | None]:
    return [record[key] for record in steps]


def _by_key(steps: Steps, key: str) -> dict[str, list[float | None]]:
    names = sorted({name for record in steps for name in record[key]})
    return {short_name(name): [record[key].get(name) for record in steps] for name in names}


def short_name(env_id: str) -> str:
    """`palaestra/CodeRepair-v0` as `CodeRepair`."""
    return env_id.rpartition("/")[2].partition("-v")[0]
