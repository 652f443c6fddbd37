"""Estimates with their uncertainty: Wilson intervals, also over several samples of one task, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Proportion:
    """A success rate with its 95 % interval; all in [0, 1]. NaN where nothing was counted."""

    rate: float
    low: float
    high: float
    count: int


def wilson(num_successes: int, count: int, *, effective_count: float | None = None) -> Proportion:
    """Wilson score interval at 95 % (E. B. Wilson, 1927, JASA 22:209).

    `effective_count`, by default `count`, is how many independent ones the `count` are worth.
    """
    if count == 0:
        return Proportion(math.nan, math.nan, math.nan, 0)
    rate = num_successes / count
    weight = count if effective_count is None else effective_count
    spread = _Z_95 * math.sqrt(rate * (1 - rate) / weight + _Z_95**2 / (4 * weight**2))
    centre = rate + _Z_95**2 / (2 * weight)
    scale = 1 + _Z_95**2 / weight
    return Proportion(rate, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale), count)


def wilson_of_tasks(successes: Sequence[tuple[int, int]]) -> Proportion:
    """Wilson interval over samples of tasks, given as (number correct, number sampled) of each task.

    Samples of one task resemble each other, so that they are worth fewer independent ones: n over Kish's design
    effect 1 + (sum(m^2)/n - 1) * rho, with m samples of a task, n in all and rho the correlation within a task
    (Survey Sampling, 1965, sec. 5.4; for unequal m Gabler, Haeder and Lahiri, 1999, Survey Methodology 25:105).
    """
    drawn = [(correct, sampled) for correct, sampled in successes if sampled]
    correct = sum(correct for correct, _ in drawn)
    count = sum(sampled for _, sampled in drawn)
    if len(drawn) == count:
        return wilson(correct, count)
    excess = sum(sampled**2 for _, sampled in drawn) / count - 1
    return wilson(correct, count, effective_count=count / (1 + excess * _correlation(drawn)))


def _correlation(successes: Sequence[tuple[int, int]]) -> float:
    """Correlation of the samples of one task, from 0 to 1: the analysis-of-variance estimate (Donner, 1986, ISR 54:67).

    Ours: two tasks are added, all right and all wrong, since few tasks, or samples that all agree, say little about
    it, and the interval should be wide then.
    """
    mean_size = math.ceil(sum(sampled for _, sampled in successes) / len(successes))
    tasks = [*successes, (mean_size, mean_size), (0, mean_size)]
    count = sum(sampled for _, sampled in tasks)
    rate = sum(correct for correct, _ in tasks) / count
    within = math.fsum(correct * (1 - correct / sampled) for correct, sampled in tasks) / (count - len(tasks))
    between = math.fsum(sampled * (correct / sampled - rate) ** 2 for correct, sampled in tasks) / (len(tasks) - 1)
    size = (count - sum(sampled**2 for _, sampled in tasks) / count) / (len(tasks) - 1)
    return max(0.0, (between - within) / (between + (size - 1) * within))


def pass_at_k(successes: Sequence[tuple[int, int]], k: int) -> float:
    """Unbiased pass@k, averaged over tasks (Chen et al., arXiv:2107.03374, eq. 1).

    `successes` holds (number correct, number sampled) of each task; raises `ValueError` when a task has
    fewer than k samples.
    """
    if not successes:
        return math.nan
    return math.fsum(_pass_at_k(correct, sampled, k) for correct, sampled in successes) / len(successes)


def _pass_at_k(correct: int, sampled: int, k: int) -> float:
    if sampled < k:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {sampled}")
    if sampled - correct < k:
        return 1.0
    return 1.0 - math.prod((sampled - correct - i) / (sampled - i) for i in range(k))
