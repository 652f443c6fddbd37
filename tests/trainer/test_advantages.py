"""Advantages: hand-computed groups, and that only valid siblings vote."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palaestra.errors import ConfigError
from palaestra.trainer.advantages import advantage_estimator, advantage_names, estimate_advantages

REWARDS = st.lists(st.floats(0, 10), min_size=0, max_size=12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean_centred", [2.0, -1.0, -1.0]),
        ("sample_std", [2 / (math.sqrt(3) + 1e-6), -1 / (math.sqrt(3) + 1e-6), -1 / (math.sqrt(3) + 1e-6)]),
        ("population_std", [math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5)]),
        ("rloo", [3.0, -1.5, -1.5]),
        ("maxrl", [2.0, -1.0, -1.0]),
    ],
)
def test_rewards_3_0_0_by_hand(name: str, expected: list[float]) -> None:
    np.testing.assert_allclose(estimate_advantages(name, [3.0, 0.0, 0.0]), expected, atol=1e-7)


@pytest.mark.parametrize("name", advantage_names())
@given(rewards=REWARDS, data=st.data())
def test_invalid_rows_change_nothing_of_the_others(name: str, rewards: list[float], data: st.DataObject) -> None:
    is_valid = data.draw(st.lists(st.booleans(), min_size=len(rewards), max_size=len(rewards)))
    spoilt = [reward if valid else data.draw(st.sampled_from([math.nan, math.inf, -1e9]))
              for reward, valid in zip(rewards, is_valid, strict=True)]  # fmt: skip
    advantages = estimate_advantages(name, spoilt, is_valid)
    alone = estimate_advantages(name, [r for r, valid in zip(rewards, is_valid, strict=True) if valid])
    np.testing.assert_array_equal(advantages[np.array(is_valid, dtype=bool)], alone)
    np.testing.assert_array_equal(advantages[~np.array(is_valid, dtype=bool)], 0.0)


@pytest.mark.parametrize("name", advantage_names())
@given(rewards=st.lists(st.floats(0, 10), min_size=2, max_size=12))
def test_advantages_of_a_group_sum_to_zero(name: str, rewards: list[float]) -> None:
    advantages = estimate_advantages(name, rewards)
    assert np.all(np.isfinite(advantages))
    assert abs(advantages.sum()) <= 1e-6 * max(1.0, float(np.abs(advantages).max()))


@pytest.mark.parametrize("name", advantage_names())
@given(reward=st.floats(0, 1e6), count=st.integers(1, 16))
def test_equal_rewards_and_groups_of_one_have_advantage_exactly_zero(name: str, reward: float, count: int) -> None:
    assert not estimate_advantages(name, [reward] * count).any()


def test_one_valid_sibling_has_advantage_zero() -> None:
    np.testing.assert_array_equal(estimate_advantages("rloo", [1.0, 0.0, 0.5], [True, False, False]), 0.0)


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mean_centred'"):
        estimate_advantages("mean_centered", [1.0, 0.0])


def test_name_is_registered_once() -> None:
    with pytest.raises(ConfigError, match="registered twice"):
        advantage_estimator("rloo")(lambda rewards_V: rewards_V)


def test_maxrl_refuses_negative_rewards() -> None:
    with pytest.raises(ConfigError, match=r"needs rewards >= 0, got -0\.5"):
        estimate_advantages("maxrl", [1.0, -0.5])


@pytest.mark.parametrize("rewards", [[1.0, math.nan], [1.0, math.inf]])
def test_valid_reward_that_is_not_finite_is_refused(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="not finite"):
        estimate_advantages("mean_centred", rewards)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"must both have shape \(G,\)"):
        estimate_advantages("mean_centred", [1.0, 0.0], [True])
