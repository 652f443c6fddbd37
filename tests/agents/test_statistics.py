"""Intervals and pass@k against published and hand-computed numbers."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palaestra.agents import pass_at_k, wilson


def test_wilson_matches_the_textbook() -> None:
    # 8 of 10: centre (0.8 + 1.9207/10) / 1.38415, half-width 1.96 sqrt(0.016 + 3.8415/400) / 1.38415
    estimate = wilson(8, 10)
    assert estimate.rate == 0.8
    assert estimate.low == pytest.approx(0.4901625, abs=1e-6)
    assert estimate.high == pytest.approx(0.9433178, abs=1e-6)


def test_wilson_of_nothing_is_nan() -> None:
    assert math.isnan(wilson(0, 0).rate)


@given(st.integers(1, 500), st.data())
def test_wilson_contains_its_rate_and_stays_in_the_unit_interval(count: int, data: st.DataObject) -> None:
    estimate = wilson(data.draw(st.integers(0, count)), count)
    assert 0.0 <= estimate.low <= estimate.rate + 1e-12
    assert estimate.rate - 1e-12 <= estimate.high <= 1.0


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_success(sampled: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, sampled))
    k = data.draw(st.integers(1, sampled))
    outcomes = [True] * correct + [False] * (sampled - correct)
    subsets = list(combinations(outcomes, k))
    assert pass_at_k([(correct, sampled)], k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_refuses_too_few_samples() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        pass_at_k([(1, 3)], 4)
