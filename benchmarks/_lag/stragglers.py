"""What waiting for slow tasks costs, what each remedy cuts, and what the policy then lacks: the bias.

Invariant: groups and episodes are counted from the run's ledger, rates from held-out tasks whose tools answer at once.
"""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._lag.figures import difference, durations, load, rate
from benchmarks._lag.judge import kind_of
from benchmarks._lag.plan import DEADLINE_S, REMEDIES, STRAGGLER_FACTOR, STRAGGLER_MS, straggler_runs
from benchmarks._lag.results import Results, describe_dropped

from palaestra.agents import Proportion
from palaestra.trainer.ledger import read_records, read_step
from palaestra.types import Episode, Outcome, Task

_WIDTH = 118
KINDS = {"short": ("short",), "long": ("long",), "slow": ("slow",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One way of dealing with slow tasks, over its seeds. Shares are of episodes, in [0, 1]."""

    name: str
    num_runs: int
    mean_s: float
    slowest_s: float
    cut: Mapping[str, float | None]
    """Share of the episodes in trained groups that were cut, by kind of task."""
    turns: float | None
    turns_cut: float | None
    """Turns that cut episodes had when they were cut."""
    slow_played: float
    slow_trained: float
    """Share of slow tasks among the groups played, and among the episodes that got an advantage."""
    dropped: Mapping[str, int]
    after: Mapping[str, Proportion] | None


def remedies(results: Results) -> list[Remedy]:
    """All that were played."""
    found = []
    for number, name in enumerate(REMEDIES):
        planned = [straggler_runs(seed, results.updates)[number] for seed in results.seeds]
        runs = [results.runs / run.name for run in planned]
        there = [run for run in runs if (run / "done.json").is_file()]
        if there:
            found.append(_remedy(name, there))
    return found


def _remedy(name: str, runs: list[Path]) -> Remedy:
    kept = [load(run / "done.json") for run in runs]
    seconds = [each for found in kept for each in durations(found)[1:]]
    trained = [e for run, found in zip(runs, kept, strict=True) for e in _trained(run, len(found["steps"]))]
    is_cut = [episode.outcome is Outcome.CANCELLED for episode in trained]
    kinds = [kind_of(episode.task) for episode in trained]
    played = [kind for run in runs for kind in _played(run)]
    used = [kind for kind, cut in zip(kinds, is_cut, strict=True) if not cut]
    dropped: Counter[str] = Counter()
    for found in kept:
        for step in found["steps"]:
            dropped.update(step["dropped"])
    judged = [load(run / "judged-stragglers.json") for run in runs]
    verdicts = [each for by_update in judged if by_update for values in by_update.values() for each in values]
    return Remedy(
        name=name,
        num_runs=len(runs),
        mean_s=statistics.fmean(seconds),
        slowest_s=statistics.quantiles(seconds, n=10, method="inclusive")[-1],
        cut={kind: _mean([cut for cut, its in zip(is_cut, kinds, strict=True) if its == kind]) for kind in KINDS},
        turns=_mean([len(e.turns) for e, cut in zip(trained, is_cut, strict=True) if not cut]),
        turns_cut=_mean([len(e.turns) for e, cut in zip(trained, is_cut, strict=True) if cut]),
        slow_played=played.count("slow") / len(played),
        slow_trained=used.count("slow") / len(used),
        dropped=dropped,
        after={kind: rate(verdicts, wanted) for kind, wanted in KINDS.items()} if verdicts else None,
    )


def _trained(run: Path, num_steps: int) -> list[Episode]:
    """All episodes of the groups that were trained."""
    return [
        episode
        for step in range(1, num_steps + 1)
        for _, group in read_step(run, step).groups
        for episode in group.episodes
    ]


def _played(run: Path) -> list[str]:
    """The kinds of all groups of which an episode ended, trained or not."""
    tasks = {record["id"].partition(".")[0]: record["task"] for record in read_records(run)}
    return [kind_of(Task(**task)) for task in tasks.values()]


def _mean(values: list[Any]) -> float | None:
    return statistics.fmean(values) if values else None


def section(results: Results) -> list[str]:
    """The part of the page."""
    found = remedies(results)
    if not found:
        return ["## Stragglers", "", "Not played."]
    start = load(results.runs / "start" / "judged-stragglers.json")
    before = {kind: rate(start["0"], wanted) for kind, wanted in KINDS.items()}
    return [
        "## Stragglers",
        "",
        *paragraph(
            f"Tools of {STRAGGLER_MS} ms; in one task of ten, all of them among those that ask for two changes, a call "
            f"takes {STRAGGLER_FACTOR} times as long with probability one half. Slow tasks are thus long ones, and of "
            "their episodes the longer ones are slower. `short` tasks ask for one change, `long` ones for two with "
            "tools that are not slow: what they and `slow` tasks differ in is time alone.",
            "Spare rollouts play ten episodes of a task and cut the last two; the deadline cuts what still runs "
            f"{DEADLINE_S:g} s after a group began, and drops a group of which less than two episodes are left, as "
            "`late`. `async` keeps on while a group is late, and drops it as `stale` when it has become too old.",
        ),
        "",
        *_cost_table(found),
        "",
        "Afterwards, on held-out tasks whose tools all answer at once (95 % Wilson intervals, two samples a task):",
        "",
        *_bias_table(before, found),
        "",
        *_reading(found),
    ]


def _cost_table(found: list[Remedy]) -> list[str]:
    lines = [
        "| setting | runs | s an update | slowest tenth over | cut: short | long | slow | turns, trained | "
        "turns, cut | slow tasks: of groups played | of episodes trained | groups dropped |",
        "| --- |" + " --- |" * 11,
    ]
    for one in found:
        cut = " | ".join(_percent(one.cut[kind]) for kind in KINDS)
        lines.append(
            f"| {one.name} | {one.num_runs} | {one.mean_s:.2f} | {one.slowest_s:.2f} s | {cut} | "
            f"{_number(one.turns)} | {_number(one.turns_cut)} | {one.slow_played:.1%} | {one.slow_trained:.1%} | "
            f"{describe_dropped(one.dropped)} |"
        )
    return lines


def _bias_table(before: Mapping[str, Proportion], found: list[Remedy]) -> list[str]:
    lines = ["| policy | short | long | slow | slow minus long |", "| --- |" + " --- |" * 4]
    rows = [("start", before), *((one.name, one.after) for one in found if one.after is not None)]
    for name, after in rows:
        gap = difference(after["slow"], after["long"])
        cells = " | ".join(interval(after[kind]) for kind in KINDS)
        lines.append(f"| {name} | {cells} | {points(gap.value)} [{points(gap.low)}, {points(gap.high)}] |")
    return lines


def _reading(found: list[Remedy]) -> list[str]:
    """A sentence for each remedy against the first of all, which waits for everybody."""
    base, *others = found
    if base.name != next(iter(REMEDIES)):
        return []
    lines = []
    for one in others:
        cost = f"`{one.name}` takes {one.mean_s / base.mean_s:.2f} times what `{base.name}` takes for an update"
        share = (
            f"of the episodes it trains on {one.slow_trained:.1%} are of slow tasks (`{base.name}`: "
            f"{base.slow_trained:.1%}; played: {one.slow_played:.1%}), and they have {_number(one.turns)} turns "
            f"(`{base.name}`: {_number(base.turns)})"
        )
        line = f"- {cost}; {share}"
        if one.after is not None and base.after is not None:
            moved = difference(one.after["slow"], base.after["slow"])
            verdict = "a clear difference" if moved.is_clear else "no difference that these tasks can show"
            line += (
                f"; afterwards its success on slow tasks differs by {points(moved.value)} points [{points(moved.low)}, "
                f"{points(moved.high)}] from that of `{base.name}`: {verdict}"
            )
        lines.append(f"{line}.")
    return lines


def interval(value: Proportion) -> str:
    """A rate with its interval, in per cent."""
    return f"{value.rate:.1%} [{value.low:.1%}, {value.high:.1%}] of {value.count}"


def paragraph(*texts: str) -> list[str]:
    """Texts as paragraphs of a page."""
    wrapped = ("\n".join(textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)) for text in texts)
    return ["\n\n".join(wrapped)]


def points(value: float) -> str:
    """A difference in points, with its sign."""
    return f"{100 * value:+.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
