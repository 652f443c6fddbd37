"""The page: tables of times and of held-out success, and in a sentence each what they show.

Invariant: every finding is worded from the figures of the runs that are there; what was left out is listed.
"""

from __future__ import annotations

import os
import platform
from argparse import Namespace
from datetime import date
from pathlib import Path
from statistics import fmean

from benchmarks._lag.figures import Difference, difference, rate, time_to
from benchmarks._lag.plan import (
    GROUP_SIZE,
    GROUPS_PER_STEP,
    LATENCIES_MS,
    NUM_HELD_OUT,
    SAVE_EVERY,
    SETTINGS,
    SYNC,
    Setting,
)
from benchmarks._lag.plots import draw_success, draw_time
from benchmarks._lag.results import Cell, Results, describe_dropped
from benchmarks._lag.stragglers import interval, paragraph, points, section

from palaestra.agents import Proportion

_TARGET_SHARE = 0.8
_BRACKETS = "Brackets beside seconds: when the upper, and when the lower ends of the intervals reach it."


def write_page(here: Path, options: Namespace) -> None:
    """Write `lag.md`, `lag_success.png` and `lag_time.png` from what is in the folder of the sweep."""
    results = Results(options.runs, options.seeds, options.updates)
    draw_success(results, here / "lag_success.png")
    draw_time(results, here / "lag_time.png")
    (here / "lag.md").write_text("\n".join([*_head(results, options), *_body(results)]) + "\n")


def _head(results: Results, options: Namespace) -> list[str]:
    seeds = " ".join(map(str, options.seeds))
    note = (options.runs / "start" / "note.txt").read_text()
    return [
        "# One loop, five settings: what lag buys and what it costs",
        "",
        f"Made on {date.today()} by `python benchmarks/lag.py --seeds {seeds} --updates {options.updates}` on "
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}.",
        "",
        *paragraph(
            f"Every run trains the same model for {options.updates} updates of {GROUPS_PER_STEP} tasks with "
            f"{GROUP_SIZE} episodes each, with vLLM and the same learner; settings differ in `mode` and `max_lag` "
            "alone. Tasks are those of the service desk in its compact form, over HTTP, with the latency added to "
            "every tool call. As many episodes are played at once as the lag allows.",
            f"The start policy: {note}. It solves {interval(results.start)} of the held-out tasks.",
        ),
        "",
        *_what_is_missing(results),
    ]


def _what_is_missing(results: Results) -> list[str]:
    missing = results.missing
    if not missing:
        return []
    there = len(results.plan) - len(missing)
    whole = [seed for seed in results.seeds if all(run.name in missing for run in results.plan if run.seed == seed)]
    cut = [f"all of seed {seed}" for seed in whole]
    cut += [f"`{run.name}`" for run in results.plan if run.name in missing and run.seed not in whole]
    said = f"Of {len(results.plan)} planned runs {there} were played in the time there was. Cut: {', '.join(cut)}."
    return [*paragraph(said), ""]


def _body(results: Results) -> list[str]:
    return [
        "## What it shows",
        "",
        *_read_speed(results),
        *_read_learning(results),
        *_read_both(results),
        "",
        "## Time",
        "",
        *_definitions(results),
        "",
        *_time_table(results),
        "",
        "![seconds an update by setting and latency](lag_time.png)",
        "",
        "## Held-out success",
        "",
        *paragraph(
            f"Checkpoints of every {SAVE_EVERY} updates, judged after the runs on {NUM_HELD_OUT} held-out tasks at "
            "temperature 1, with tools that answer at once; 95 % Wilson intervals, which cover the tasks drawn and not "
            "what differs between two runs of one setting."
        ),
        "",
        *_success_table(results),
        "",
        "![held-out success against updates and against wall time](lag_success.png)",
        "",
        *section(results),
    ]


def _definitions(results: Results) -> list[str]:
    return paragraph(
        "Seconds are of one update, of the loop alone: start-up is over when they begin, writing checkpoints is in "
        "them. The first update of each run, which fills the pipeline, is left out, but not of the loop's total.",
        "*Generation alone* is the same loop with a learner that takes no time and leaves the weights as they are, "
        "those of the middle of a `sync` run: seconds a batch with as many batches in play as the setting allows "
        "(`sync` and `one-step` one, `async` its lag and one more), after the first wave. While a real learner learns "
        f"a batch, one less is in play. {_tokens_alone(results)}",
        "*Learning alone* is the learner's step and the weight sync in `sync`, where nothing else runs then. *Ideal* "
        "is the longer of the two; *over ideal* is what an update takes, divided by it.",
        "*Faster* is the loop's total of `sync` with the same latency and seeds, divided by this one's. *Cores* is CPU "
        "time over wall time of all processes together: where it comes near the number of cores, the machine is the "
        f"limit. {_others(results)}",
    )


def _others(results: Results) -> str:
    found = results.others
    if not found:
        return ""
    return (
        f"What was not ours kept {fmean(found):.2f} cores busy on average while runs were timed, and {max(found):.2f} "
        "in the worst run."
    )


def _tokens_alone(results: Results) -> str:
    alone = [cell.tokens_alone for cell in results.cells if cell.tokens_alone is not None]
    if not alone:
        return "It was not measured."
    runs = fmean(cell.timing.num_tokens for cell in results.cells)
    return f"Its batches had {fmean(alone):.0f} sampled tokens on average, those of the runs {runs:.0f}."


def _time_table(results: Results) -> list[str]:
    lines = [
        "| tools | setting | seeds | s an update: mean | median [quartiles] | loop, s | generation alone | "
        "learning alone | ideal | over ideal | faster | cores | lag: mean, most | groups dropped | tokens |",
        "| --- |" + " --- |" * 14,
    ]
    for cell in results.cells:
        timing, sync = cell.timing, results.sync_of(cell)
        ideal = results.ideal(cell)
        lines.append(
            f"| {cell.latency_ms} ms | {cell.setting.name} | {len(cell.seeds)} | {timing.mean_s:.2f} | "
            f"{timing.median_s:.2f} [{timing.low_s:.2f}, {timing.high_s:.2f}] | {timing.total_s:.0f} | "
            f"{_seconds(cell.generation_s)} | {_seconds(sync.timing.learn_s if sync else None)} | {_seconds(ideal)} | "
            f"{_seconds(timing.mean_s / ideal if ideal else None)} | {_seconds(results.speedup(cell))} | "
            f"{timing.num_cores:.2f} | {timing.lag_mean:.2f}, {timing.lag_max} | {describe_dropped(timing.dropped)} | "
            f"{timing.num_tokens:.0f} |"
        )
    return lines


def _success_table(results: Results) -> list[str]:
    updates = sorted({update for cell in results.cells for update in cell.curve if update})
    target = _target(results)
    lines = [
        "| tools | setting | " + " | ".join(f"after {update}" for update in updates) + " | s to the target |",
        "| --- |" + " --- |" * (len(updates) + 2),
    ]
    for cell in results.cells:
        rates = " | ".join(_short(cell.curve.get(update)) for update in updates)
        lines.append(f"| {cell.latency_ms} ms | {cell.setting.name} | {rates} | {_told_time(cell, target)} |")
    if target is not None:
        share = f"{_TARGET_SHARE:.0%} of the way from the start to where `sync` ended, over all latencies"
        lines += ["", *paragraph(f"The target is a success of {target:.1%}: {share}. {_BRACKETS}")]
    return lines


def _read_speed(results: Results) -> list[str]:
    lines = []
    for latency_ms in LATENCIES_MS:
        others = [c for c in results.cells if c.latency_ms == latency_ms and c.setting != SYNC]
        rated = [(faster, cell) for cell in others if (faster := results.speedup(cell)) is not None]
        if not rated:
            continue
        said = ", ".join(f"`{cell.setting.name}` {faster:.2f}" for faster, cell in rated)
        _, cell = max(rated, key=lambda each: each[0])
        line = f"- Tools of {latency_ms} ms: times as fast as `sync`: {said}."
        if (ideal := results.ideal(cell)) is not None:
            line += (
                f" The fastest, `{cell.setting.name}`, takes {cell.timing.mean_s / ideal:.2f} times the ideal "
                f"and keeps {cell.timing.num_cores:.1f} cores busy."
            )
        lines.append(line)
    return lines


def _read_learning(results: Results) -> list[str]:
    """Each setting against `sync` after the same number of updates, over all latencies."""
    base = pooled(results, SYNC)
    lines = []
    for setting in SETTINGS:
        found = pooled(results, setting)
        if setting == SYNC or base is None or found is None:
            continue
        lines.append(f"`{setting.name}` {_describe(difference(found, base))}")
    if not lines or base is None:
        return []
    return [
        f"- After the same {results.updates} updates, over all latencies, `sync` solves {interval(base)}; against it "
        + "; ".join(lines)
        + "."
    ]


def _read_both(results: Results) -> list[str]:
    target = _target(results)
    if target is None:
        return []
    lines = []
    for latency_ms in LATENCIES_MS:
        cells = [c for c in results.cells if c.latency_ms == latency_ms and c.last is not None]
        reached = [(at_s, c) for c in cells if (at_s := _time_to_target(c, target)) is not None]
        if not reached:
            continue
        _, first = min(reached, key=lambda each: each[0])
        sync = next((c for _, c in reached if c.setting == SYNC), None)
        is_other = sync is not None and first.setting != SYNC
        against = f", `sync` after {_told_time(sync, target)} s" if sync is not None and is_other else ""
        lines.append(
            f"- With tools of {latency_ms} ms `{first.setting.name}` is the first at {target:.1%}, after "
            f"{_told_time(first, target)} s{against}."
        )
    return lines


def pooled(results: Results, setting: Setting) -> Proportion | None:
    """Success of a setting's last checkpoints, over latencies and seeds; None unless all latencies are there."""
    verdicts = []
    cells = [cell for cell in results.cells if cell.setting == setting and cell.last is not None]
    if {cell.latency_ms for cell in cells} != set(LATENCIES_MS):
        return None
    for cell in cells:
        verdicts += results.last_verdicts(cell)
    return rate(verdicts)


def _target(results: Results) -> float | None:
    base = pooled(results, SYNC)
    return None if base is None else results.start.rate + _TARGET_SHARE * (base.rate - results.start.rate)


def _time_to_target(cell: Cell, target: float | None) -> float | None:
    return None if target is None else time_to(target, [(at_s, rate.rate) for at_s, rate in cell.curve.values()])


def _told_time(cell: Cell, target: float | None) -> str:
    """Seconds to the target, and in brackets when the upper and when the lower ends of the intervals are there."""
    if target is None or cell.last is None:
        return "-"
    earliest = time_to(target, [(at_s, rate.high) for at_s, rate in cell.curve.values()])
    latest = time_to(target, [(at_s, rate.low) for at_s, rate in cell.curve.values()])
    return f"{_or_never(_time_to_target(cell, target))} [{_or_never(earliest)}, {_or_never(latest)}]"


def _describe(found: Difference) -> str:
    verdict = "clear" if found.is_clear else "not clear"
    return f"{points(found.value)} points [{points(found.low)}, {points(found.high)}], {verdict}"


def _or_never(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.0f}"


def _short(point: tuple[float, Proportion] | None) -> str:
    return "-" if point is None else f"{point[1].rate:.0%} [{point[1].low:.0%}, {point[1].high:.0%}]"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
