"""Simulated engines whose noise hides every single step: the one that stands still is found, no other is accused."""

from __future__ import annotations

import numpy as np
import pytest

from palaestra.trainer._following import Following

_SCATTER = float(np.sqrt(np.pi / 2))
"""Standard deviation of a normal distribution whose mean distance from 0 is 1."""


def syncs_until_found(
    seed: int,
    *,
    slope: float,
    count: int,
    healthy: int = 0,
    noise: float = 0.012,
    step: float = 0.0024,
    num_tokens: int = 200,
    shared: float = 0.0,
    spread: float = 0.0,
) -> int | None:
    """How many of `count` syncs an engine gets through that follows by `slope` after `healthy` ones; None for all.

    `noise` and `step` are nats on average; `shared` is the part of the noise that pulls all tokens the same way, which
    is the step's, and `spread` how much tokens and steps differ in size.
    """
    rng, following = np.random.default_rng(seed), Following()
    for index in range(healthy + count):
        ours = rng.normal(size=num_tokens) * step * _SCATTER * np.exp(spread * rng.normal())
        sizes = noise * _SCATTER * np.exp(spread * rng.normal(size=num_tokens))
        own = rng.normal(size=(2, num_tokens)) * sizes * np.sqrt(1 - shared)
        pull = rng.normal(size=(2, 1)) * np.sign(ours) * noise * _SCATTER * np.sqrt(shared)
        before, after = own + pull
        following.add((1.0 if index < healthy else slope) * ours + after - before, ours)
        if following.slope_of_stillness() is not None:
            return index - healthy
    return None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("healthy", [0, 300])
def test_an_engine_that_stands_still_is_found(seed: int, healthy: int) -> None:
    """Each step is a fifth of the noise."""
    found = syncs_until_found(seed, slope=0.0, count=64, healthy=healthy)
    assert found is not None
    assert found >= 0, "it was not accused before"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("shared", "spread", "num_tokens", "step"),
    [(0.0, 0.0, 200, 0.0024), (0.3, 1.0, 200, 0.0024), (0.3, 1.0, 200, 0.0002), (0.0, 0.0, 2, 0.0024)],
)
def test_an_engine_that_follows_is_never_accused(
    seed: int, shared: float, spread: float, num_tokens: int, step: float
) -> None:
    found = syncs_until_found(
        seed, slope=1.0, count=2000, shared=shared, spread=spread, num_tokens=num_tokens, step=step
    )
    assert found is None


def test_one_that_follows_by_half_is_not_accused() -> None:
    assert syncs_until_found(0, slope=0.5, count=1000) is None


def test_steps_that_do_not_move_the_learner_say_nothing() -> None:
    following = Following()
    for _ in range(300):
        following.add(np.zeros(10), np.zeros(10))
    assert following.slope_of_stillness() is None
