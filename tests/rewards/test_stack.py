"""The algebra of rewards: linear, associative, in order, gated; and an error is never a number."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palaestra.errors import RewardError
from palaestra.rewards import Reward, RewardStack, Score, Success
from palaestra.rewards._stack import Gate
from palaestra.types import Transcript
from tests.rewards.conftest import make_transcript

TRANSCRIPT = make_transcript()

VALUES = st.floats(-1e6, 1e6)
WEIGHTS = st.floats(-100, 100)


class Fixed(Reward):
    """A term with a given value, or one that raises it; counts how often it is asked."""

    def __init__(self, value: Any, name: str = "fixed") -> None:
        self.name = name
        self.given = value
        self.num_asked = 0

    async def value(self, transcript: Transcript) -> float | None:
        self.num_asked += 1
        if isinstance(self.given, BaseException):
            raise self.given
        result: float | None = self.given
        return result


@st.composite
def stacks(draw: st.DrawFn) -> RewardStack:
    """Up to four weighted terms, some of them gated."""
    result = RewardStack(())
    for number in range(draw(st.integers(1, 4))):
        part = Fixed(draw(VALUES), f"t{number}") * draw(WEIGHTS)
        if draw(st.booleans()):
            part = part.when(Fixed(draw(VALUES)) > draw(VALUES))
        result = result + part
    return result


def score(stack: RewardStack) -> Score:
    return asyncio.run(stack.score(TRANSCRIPT))


def is_near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-6)


@given(stacks())
def test_the_total_is_the_sum_of_the_contributions(stack: RewardStack) -> None:
    scored = score(stack)
    assert scored.total == math.fsum(term.contribution for term in scored.terms)


@given(stacks(), stacks())
def test_addition_adds_totals_and_keeps_the_terms_in_order(one: RewardStack, other: RewardStack) -> None:
    both = score(one + other)
    assert is_near(both.total, score(one).total + score(other).total)
    assert both.terms == score(one).terms + score(other).terms


@given(stacks(), stacks(), stacks())
def test_addition_is_associative_to_the_last_bit(a: RewardStack, b: RewardStack, c: RewardStack) -> None:
    assert (a + b) + c == a + (b + c)
    assert score((a + b) + c) == score(a + (b + c))


@given(stacks(), stacks())
def test_the_total_does_not_depend_on_the_order(one: RewardStack, other: RewardStack) -> None:
    assert score(one + other).total == score(other + one).total


@given(stacks(), WEIGHTS)
def test_scaling_is_linear(stack: RewardStack, factor: float) -> None:
    assert is_near(score(stack * factor).total, score(stack).total * factor)
    assert score(stack * factor) == score(factor * stack)


@given(stacks(), stacks(), WEIGHTS)
def test_scaling_distributes_over_addition(one: RewardStack, other: RewardStack, factor: float) -> None:
    assert score((one + other) * factor) == score(one * factor + other * factor)


@given(stacks(), stacks())
def test_subtraction_adds_the_negative(one: RewardStack, other: RewardStack) -> None:
    assert score(one - other) == score(one + -other)
    assert is_near(score(one - one).total, 0.0)


@given(stacks())
def test_an_open_gate_changes_nothing_and_a_shut_one_leaves_only_raw_values(stack: RewardStack) -> None:
    assert score(stack.when(Success() > 0)) == score(stack)
    shut = score(stack.when(Success() < 1))
    assert shut.total == 0.0
    assert all(term.contribution == 0.0 for term in shut.terms)
    assert [t.value for t in shut.terms] == [t.value for t in score(stack).terms]


@given(stacks(), stacks(), VALUES, VALUES)
def test_a_gate_distributes_over_addition(one: RewardStack, other: RewardStack, value: float, bound: float) -> None:
    gate = Fixed(value) >= bound
    assert score((one + other).when(gate)) == score(one.when(gate) + other.when(gate))


@given(stacks(), VALUES, VALUES, VALUES)
def test_gates_multiply_in_any_order(stack: RewardStack, value: float, low: float, high: float) -> None:
    term = Fixed(value)
    both = score(stack.when(term >= low).when(term <= high))
    assert both == score(stack.when(term <= high).when(term >= low))
    assert both == (score(stack) if low <= value <= high else score(stack.when(Success() < 0)))


@given(VALUES, VALUES)
def test_gates_compare_like_numbers(value: float, bound: float) -> None:
    term = Fixed(value)
    gates: list[Gate] = [term > bound, term >= bound, term < bound, term <= bound]
    is_open = [score(Fixed(1.0) * 1.0 + (Fixed(1.0) * 1.0).when(gate)).total == 2.0 for gate in gates]
    assert is_open == [value > bound, value >= bound, value < bound, value <= bound]


@given(VALUES)
def test_a_bare_term_counts_once(value: float) -> None:
    assert score(Fixed(value) + Fixed(0.0)).total == value
    assert score(Fixed(0.0) - Fixed(value)).total == -value
    assert score(-Fixed(value)).total == -value


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, "high", [1.0], ValueError("x"), TimeoutError()])
def test_a_term_without_a_finite_value_is_an_error_and_never_zero(value: Any) -> None:
    with pytest.raises(RewardError, match="fixed"):
        score(Success() + Fixed(value))


@pytest.mark.parametrize("value", [None, math.nan, KeyError("x")])
def test_a_gate_that_cannot_say_is_an_error_and_never_shut(value: Any) -> None:
    with pytest.raises(RewardError, match="fixed"):
        score((Success() * 1.0).when(Fixed(value) > 0))


def test_a_failing_term_behind_a_shut_gate_is_still_an_error() -> None:
    with pytest.raises(RewardError, match="fixed"):
        score((Fixed(None) * 1.0).when(Success() < 0))


def test_a_failing_term_of_weight_zero_is_still_an_error() -> None:
    with pytest.raises(RewardError, match="fixed"):
        score(Success() + Fixed(None) * 0.0)


@pytest.mark.parametrize("factor", [10.0, -10.0])
def test_a_sum_beyond_the_largest_float_is_an_error(factor: float) -> None:
    with pytest.raises(RewardError, match="no finite number"):
        score(Fixed(1e308) * factor + Success())
    with pytest.raises(RewardError, match="no finite number"):
        score(Fixed(1e308) * 1.0 + Fixed(1e308) * 1.0)
    with pytest.raises(RewardError, match="no finite number"):
        score(Fixed(1e308) * factor - Fixed(1e308) * factor)


async def test_a_cancelled_term_stays_cancelled() -> None:
    with pytest.raises(asyncio.CancelledError):
        await (Fixed(asyncio.CancelledError()) * 1.0).score(TRANSCRIPT)


def test_a_term_is_asked_once_even_when_it_gates_itself() -> None:
    judge = Fixed(0.5)
    scored = score((judge * 1.0 + judge * 2.0).when(judge > 0.25))
    assert scored.total == 1.5
    assert judge.num_asked == 1


def test_a_stack_asks_again_on_the_next_episode() -> None:
    judge = Fixed(0.5)
    stack = judge * 1.0
    score(stack)
    score(stack)
    assert judge.num_asked == 2


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_must_be_finite(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of fixed is"):
        Fixed(1.0) * weight
    with pytest.raises(ValueError, match="weight of fixed is"):
        (Fixed(1.0) * 1.0) * weight


def test_gates_must_match_the_terms() -> None:
    with pytest.raises(ValueError, match="1 terms with 2 tuples of gates"):
        RewardStack(((Fixed(1.0), 1.0),), gates=((), ()))


def test_operators_leave_their_operands_alone() -> None:
    stack = Fixed(1.0) * 2.0
    gated = stack.when(Success() < 0)
    assert (score(stack).total, score(gated).total, score(stack * 3.0).total) == (2.0, 0.0, 6.0)


def test_an_empty_stack_is_zero() -> None:
    assert score(RewardStack(())) == Score(0.0, ())
