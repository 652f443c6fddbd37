"""What is there of a sweep: each setting's times and rates, over the seeds that were played."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks._lag.figures import Found, Timing, generation_alone, load, others, rate, timing, tokens
from benchmarks._lag.plan import LATENCIES_MS, SETTINGS, SYNC, Run, Setting, all_runs, alone_of

from palaestra.agents import Proportion


@dataclass(frozen=True)
class Cell:
    """One setting with one latency, over its seeds."""

    setting: Setting
    latency_ms: int
    seeds: tuple[int, ...]
    timing: Timing
    generation_s: float | None
    """A batch with as many in play as the setting allows, with a learner that costs nothing."""
    tokens_alone: float | None
    curve: dict[int, tuple[float, Proportion]]
    """Seconds since the first rollout and held-out success, by update."""

    @property
    def last(self) -> Proportion | None:
        """Success of the last checkpoint."""
        return self.curve[max(self.curve)][1] if len(self.curve) > 1 else None


class Results:
    """Reads the folder of a sweep."""

    def __init__(self, runs: Path, seeds: Sequence[int], updates: int) -> None:
        self.runs = runs
        self.seeds = tuple(seeds)
        self.updates = updates
        self.plan = all_runs(seeds, updates)
        self._found: dict[str, Found | None] = {run.name: load(runs / run.name / "done.json") for run in self.plan}

    @property
    def missing(self) -> list[str]:
        """Names of planned runs that are not there."""
        return [name for name, found in self._found.items() if found is None]

    @property
    def others(self) -> list[float]:
        """Cores that others kept busy, run by run."""
        return [others(found) for found in self._found.values() if found is not None]

    @cached_property
    def start(self) -> Proportion:
        """Success of the start policy."""
        return rate(load(self.runs / "start" / "judged.json")["0"])

    @cached_property
    def cells(self) -> list[Cell]:
        """All settings with all latencies of which there is a run, latency by latency."""
        found = [self._cell(setting, ms) for ms in LATENCIES_MS for setting in SETTINGS]
        return [cell for cell in found if cell is not None]

    def sync_of(self, cell: Cell) -> Cell | None:
        """The same latency, synchronously, with the same seeds where that can be."""
        return next((c for c in self.cells if c.setting == SYNC and c.latency_ms == cell.latency_ms), None)

    def speedup(self, cell: Cell) -> float | None:
        """How many times as fast as `sync` with the same seeds and latency the whole loop was."""
        pairs = []
        for seed in cell.seeds:
            ours, theirs = self._run(cell.setting, cell.latency_ms, seed), self._run(SYNC, cell.latency_ms, seed)
            if ours is None or theirs is None or (found := self._found[theirs.name]) is None:
                continue
            mine = self._found[ours.name]
            assert mine is not None
            pairs.append((found["marks"][-1]["wall_s"], mine["marks"][-1]["wall_s"]))
        return sum(theirs for theirs, _ in pairs) / sum(ours for _, ours in pairs) if pairs else None

    def ideal(self, cell: Cell) -> float | None:
        """The longer of generation and learning, each alone, in seconds."""
        sync = self.sync_of(cell)
        if sync is None or cell.generation_s is None:
            return None
        return max(cell.generation_s, sync.timing.learn_s)

    def last_verdicts(self, cell: Cell) -> list[dict[str, Any]]:
        """What the last checkpoints of a setting came to on each held-out task."""
        verdicts: list[dict[str, Any]] = []
        for seed in cell.seeds:
            run = self._run(cell.setting, cell.latency_ms, seed)
            judged = load(self.runs / run.name / "judged.json") if run is not None else None
            verdicts += judged[str(max(map(int, judged)))] if judged else []
        return verdicts

    def _run(self, setting: Setting, latency_ms: int, seed: int) -> Run | None:
        return next(
            (
                run
                for run in self.plan
                if (run.setting, run.latency_ms, run.seed) == (setting, latency_ms, seed) and not run.is_of_stragglers
            ),
            None,
        )

    def _cell(self, setting: Setting, latency_ms: int) -> Cell | None:
        planned = [run for seed in self.seeds if (run := self._run(setting, latency_ms, seed)) is not None]
        there = [(run, found) for run in planned if (found := self._found[run.name]) is not None]
        if not there:
            return None
        first = self._run(setting, latency_ms, self.seeds[0])
        alone = load(self.runs / alone_of(first).name / "done.json") if first is not None else None
        return Cell(
            setting=setting,
            latency_ms=latency_ms,
            seeds=tuple(run.seed for run, _ in there),
            timing=timing([found for _, found in there]),
            generation_s=generation_alone(alone, setting.num_batches) if alone is not None else None,
            tokens_alone=tokens(alone) if alone is not None else None,
            curve=self._curve(there),
        )

    def _curve(self, there: Sequence[tuple[Run, Found]]) -> dict[int, tuple[float, Proportion]]:
        judged = [(found, load(self.runs / run.name / "judged.json")) for run, found in there]
        curve = {0: (0.0, self.start)}
        if any(verdicts is None for _, verdicts in judged):
            return curve
        for update in map(int, judged[0][1]):
            verdicts = [verdict for _, by_update in judged for verdict in by_update[str(update)]]
            at_s = statistics.fmean(found["marks"][update - 1]["wall_s"] for found, _ in judged)
            curve[update] = (at_s, rate(verdicts))
        return curve


def describe_dropped(dropped: Mapping[str, int]) -> str:
    """Groups by the reason why they were dropped."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
