"""The arithmetic of the report: times of runs, rates of checkpoints, differences with intervals.

Invariant: pure functions of what runs left; what is not there is None, never zero.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from palaestra.agents import Proportion, wilson_of_tasks

Verdicts: TypeAlias = Sequence[Mapping[str, Any]]
"""What held-out tasks came to: `task`, `kind` and `solved` of each."""
Found: TypeAlias = Mapping[str, Any]
"""What a run left: `marks` and `steps`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Times of one setting, over its seeds. Seconds are of one update unless they say otherwise.

    `median_s`, `low_s` and `high_s` (quartiles) leave out each run's first update, which fills the pipeline.
    """

    total_s: float
    mean_s: float
    median_s: float
    low_s: float
    high_s: float
    learn_s: float
    cpu_s: float
    lag_mean: float
    lag_max: int
    num_tokens: float
    dropped: Mapping[str, int]

    @property
    def num_cores(self) -> float:
        """Cores that were busy on average."""
        return self.cpu_s / self.mean_s


def timing(runs: Sequence[Found]) -> Timing:
    """The times of runs that differ by their seed alone."""
    updates = [seconds for run in runs for seconds in durations(run)[1:]]
    steps = [step for run in runs for step in run["steps"]]
    quarter, half, three_quarters = statistics.quantiles(updates, n=4, method="inclusive")
    dropped: Counter[str] = Counter()
    for step in steps:
        dropped.update(step["dropped"])
    return Timing(
        total_s=statistics.fmean(run["marks"][-1]["wall_s"] for run in runs),
        mean_s=statistics.fmean(updates),
        median_s=half,
        low_s=quarter,
        high_s=three_quarters,
        learn_s=statistics.fmean(step["learn_s"] + step["sync_s"] for step in steps if step["step"] > 1),
        cpu_s=statistics.fmean(seconds for run in runs for seconds in _differences(run, "cpu_s")[1:]),
        lag_mean=statistics.fmean(step["lag_mean"] for step in steps),
        lag_max=max(step["lag_max"] for step in steps),
        num_tokens=statistics.fmean(step["num_sampled_tokens"] for step in steps),
        dropped=dropped,
    )


def durations(run: Found) -> list[float]:
    """Wall seconds of each update."""
    return _differences(run, "wall_s")


def generation_alone(run: Found, num_batches: int) -> float:
    """Seconds a batch, after the first wave of `num_batches`, which all begin at once."""
    marks = run["marks"]
    return float((marks[-1]["wall_s"] - marks[num_batches - 1]["wall_s"]) / (len(marks) - num_batches))


def tokens(run: Found) -> float:
    """Sampled tokens of a batch."""
    return statistics.fmean(step["num_sampled_tokens"] for step in run["steps"])


def others(run: Found) -> float:
    """Cores that processes which were not ours kept busy during a run."""
    last = run["marks"][-1]
    return max(0.0, float((last["machine_s"] - last["cpu_s"]) / last["wall_s"]))


def _differences(run: Found, key: str) -> list[float]:
    values = [0.0, *(mark[key] for mark in run["marks"])]
    return [after - before for before, after in pairwise(values)]


def rate(verdicts: Iterable[Mapping[str, Any]], kinds: Sequence[str] = ()) -> Proportion:
    """Success with its Wilson interval, samples of one task counted as such; of some kinds of task, or all."""
    tasks: dict[int, list[int]] = defaultdict(list)
    for verdict in verdicts:
        if not kinds or verdict["kind"] in kinds:
            tasks[verdict["task"]].append(verdict["solved"])
    return wilson_of_tasks([(sum(solved), len(solved)) for solved in tasks.values()])


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one rate is above another, with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def difference(one: Proportion, other: Proportion) -> Difference:
    """`one` minus `other` (Newcombe, 1998, Statistics in Medicine 17:873, method 10), taken as independent.

    They are not, where both played the same tasks; the interval is then too wide rather than too narrow.
    """
    value = one.rate - other.rate
    low = value - math.hypot(one.rate - one.low, other.high - other.rate)
    high = value + math.hypot(one.high - one.rate, other.rate - other.low)
    return Difference(value, low, high)


def time_to(target: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """When a curve of (seconds, rate) first reaches a rate, on straight lines between its points; None if never."""
    for (start_s, before), (end_s, after) in pairwise(curve):
        if before >= target:
            return start_s
        if after >= target:
            return start_s + (end_s - start_s) * (target - before) / (after - before)
    return None


def load(path: Path) -> Any:
    """A JSON file, None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None
