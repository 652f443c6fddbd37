"""Estimates with their uncertainty: Wilson intervals and pass@k."""

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


def wilson(num_successes: int, count: int) -> Proportion:
    """Wilson score interval at 95 % (E. B. Wilson, 1927, JASA 22:209)."""
    if count == 0:
        return Proportion(math.nan, math.nan, math.nan, 0)
    rate = num_successes / count
    spread = _Z_95 * math.sqrt(rate * (1 - rate) / count + _Z_95**2 / (4 * count**2))
    centre = rate + _Z_95**2 / (2 * count)
    scale = 1 + _Z_95**2 / count
    return Proportion(rate, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale), count)


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
