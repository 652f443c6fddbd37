"""Intervals and pass@k against published and hand-computed numbers."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palaestra.agents import pass_at_k, wilson, wilson_of_tasks


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


@given(st.lists(st.integers(0, 1), min_size=1))
def test_one_sample_per_task_is_plain_wilson(successes: list[int]) -> None:
    assert wilson_of_tasks([(correct, 1) for correct in successes]) == wilson(sum(successes), len(successes))


@given(st.lists(st.tuples(st.integers(0, 4), st.just(4)), min_size=1))
def test_samples_of_a_task_are_worth_no_more_than_independent_ones(successes: list[tuple[int, int]]) -> None:
    correct, count = sum(c for c, _ in successes), 4 * len(successes)
    clustered, plain = wilson_of_tasks(successes), wilson(correct, count)
    assert (clustered.rate, clustered.count) == (plain.rate, plain.count)
    assert clustered.high - clustered.low >= plain.high - plain.low - 1e-12


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1))
def test_samples_that_only_repeat_their_task_narrow_nothing(tasks: list[tuple[bool, int]]) -> None:
    repeated = wilson_of_tasks([(size * is_solved, size) for is_solved, size in tasks])
    once = wilson(sum(size * is_solved for is_solved, size in tasks), repeated.count, effective_count=len(tasks))
    assert repeated.high - repeated.low >= once.high - once.low - 1e-12


def test_one_failure_more_does_not_make_the_interval_leap() -> None:
    perfect, nearly = wilson_of_tasks([(8, 8)] * 100), wilson_of_tasks([(8, 8)] * 99 + [(7, 8)])
    assert nearly.low == pytest.approx(perfect.low, abs=0.005)


@pytest.mark.parametrize(("tasks", "right", "wrong"), [(100, 0.6, 0.4), (10, 1.8, 0.2), (5, 0.6, 0.4), (50, 60, 40)])
def test_intervals_over_samples_cover_the_rate_as_often_as_they_say(tasks: int, right: float, wrong: float) -> None:
    rng = np.random.default_rng(0)
    rate, runs, covered, width, width_once = right / (right + wrong), 1000, 0, 0.0, 0.0
    for _ in range(runs):
        sizes = rng.integers(4, 9, tasks)
        correct = rng.binomial(sizes, rng.beta(right, wrong, tasks))
        estimate = wilson_of_tasks([(int(c), int(size)) for c, size in zip(correct, sizes, strict=True)])
        covered += estimate.low <= rate <= estimate.high
        width += estimate.high - estimate.low
        once = wilson(int(correct.sum()), estimate.count, effective_count=tasks)
        width_once += once.high - once.low
    assert covered / runs >= 0.93
    assert width < 0.98 * width_once  # samples add something ...
    if right > 10:
        assert width < 0.6 * width_once  # ... much where tasks are alike


def test_samples_of_one_task_taken_for_independent_ones_would_claim_too_much() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        estimate = wilson(int(rng.binomial(8, rng.beta(0.6, 0.4, 100)).sum()), 800)
        covered += estimate.low <= 0.6 <= estimate.high
    assert covered / 1000 < 0.75


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
