"""Group-relative advantages: pure functions from the rewards of one task's episodes to their advantages.

Invariants: only valid siblings vote, so an episode that failed on our side changes nobody's advantage and has
advantage 0 itself; a group with one valid episode has advantage 0; equal rewards give exactly 0.

Shape legend: `G` episodes of one group, `V` the valid ones among them (at least two).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from palaestra.config import nearest
from palaestra.errors import ConfigError

FloatArray: TypeAlias = NDArray[np.float64]
Estimator: TypeAlias = Callable[[FloatArray], FloatArray]
"""Rewards of the valid episodes, shape (V,), V >= 2, finite -> their advantages, shape (V,)."""

_ESTIMATORS: dict[str, Estimator] = {}


def advantage_estimator(name: str) -> Callable[[Estimator], Estimator]:
    """Decorator that registers an estimator; raises `ConfigError` when the name is taken."""

    def register(estimator: Estimator) -> Estimator:
        if name in _ESTIMATORS:
            raise ConfigError(f"advantage estimator {name!r} is registered twice; choose another name")
        _ESTIMATORS[name] = estimator
        return estimator

    return register


def advantage_names() -> list[str]:
    """Names that `estimate_advantages` accepts, sorted."""
    return sorted(_ESTIMATORS)


def find_advantage_estimator(name: str) -> Estimator:
    """The estimator called `name`; raises `ConfigError` with the nearest valid name."""
    if name not in _ESTIMATORS:
        raise ConfigError(f"unknown advantage estimator {name!r}{nearest(name, advantage_names())}")
    return _ESTIMATORS[name]


def estimate_advantages(
    name: str, rewards_G: Sequence[float] | FloatArray, is_valid_G: Sequence[bool] | NDArray[np.bool_] | None = None
) -> FloatArray:
    """Advantages of one group, shape (G,); 0 where invalid, and everywhere when fewer than two are valid.

    The reward of an invalid row is never read and may be nan. Raises `ConfigError` for an unknown name or for
    rewards that the estimator is not defined for, `ValueError` for other shapes or a valid reward that is not finite.
    """
    estimator = find_advantage_estimator(name)
    rewards = np.asarray(rewards_G, dtype=np.float64)
    is_valid = np.ones(rewards.shape, dtype=np.bool_) if is_valid_G is None else np.asarray(is_valid_G, dtype=np.bool_)
    if rewards.ndim != 1 or is_valid.shape != rewards.shape:
        raise ValueError(f"rewards {rewards.shape} and validity {is_valid.shape} must both have shape (G,)")
    rewards_V = rewards[is_valid]
    if not np.all(np.isfinite(rewards_V)):
        raise ValueError(f"a valid episode has a reward that is not finite: {rewards_V.tolist()}")
    advantages_G = np.zeros(rewards.shape, dtype=np.float64)
    if len(rewards_V) > 1:
        advantages_G[is_valid] = estimator(rewards_V)
    return advantages_G


@advantage_estimator("mean_centred")
def mean_centred(rewards_V: FloatArray) -> FloatArray:
    """Reward minus the group's mean: `A_i = r_i - mean(r)`. Dr. GRPO, arXiv:2503.20783 section 3.2."""
    # the mean of equal floats can be off by one ulp, which a later division by a tiny std would blow up
    if np.all(rewards_V == rewards_V[0]):
        return np.zeros_like(rewards_V)
    return rewards_V - float(rewards_V.mean())


@advantage_estimator("sample_std")
def sample_std(rewards_V: FloatArray) -> FloatArray:
    """`A_i = (r_i - mean(r)) / (std(r) + 1e-6)`, std with V - 1. GRPO, arXiv:2402.03300 section 4.1.2."""
    return mean_centred(rewards_V) / (float(rewards_V.std(ddof=1)) + 1e-6)


@advantage_estimator("sample_std_trl")
def sample_std_trl(rewards_V: FloatArray) -> FloatArray:
    """As `sample_std` with epsilon 1e-4, which is TRL's GRPOTrainer."""
    return mean_centred(rewards_V) / (float(rewards_V.std(ddof=1)) + 1e-4)


@advantage_estimator("population_std")
def population_std(rewards_V: FloatArray) -> FloatArray:
    """`A_i = (r_i - mean(r)) / (std(r) + 1e-8)`, std with V, which is TRL's asynchronous GRPO."""
    return mean_centred(rewards_V) / (float(rewards_V.std()) + 1e-8)


@advantage_estimator("rloo")
def rloo(rewards_V: FloatArray) -> FloatArray:
    """Reward minus the mean of the others: `A_i = V / (V - 1) * (r_i - mean(r))`. RLOO, arXiv:2402.14740."""
    return mean_centred(rewards_V) * len(rewards_V) / (len(rewards_V) - 1)


@advantage_estimator("maxrl")
def maxrl(rewards_V: FloatArray) -> FloatArray:
    """`A_i = (r_i - mean(r)) / mean(r)`, 0 when no episode has a reward. MaxRL, arXiv:2602.02710.

    The paper has rewards in {0, 1}; any reward >= 0 is accepted. Raises `ConfigError` for a negative one,
    because a negative mean would turn the sign of every advantage.
    """
    if np.any(rewards_V < 0):
        raise ConfigError(f"advantage 'maxrl' needs rewards >= 0, got {rewards_V.min():g}; choose another estimator")
    mean = float(rewards_V.mean())
    return mean_centred(rewards_V) / mean if mean > 0 else np.zeros_like(rewards_V)
