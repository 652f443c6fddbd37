"""The terms that every environment starts with, against hand-computed numbers."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palaestra.errors import RewardError
from palaestra.rewards import Efficiency, Reward, Success, ToolValidity, Unsafe
from palaestra.types import Transcript
from tests.rewards.conftest import make_transcript


async def value_of(term: Reward, transcript: Transcript) -> float:
    return (await (term * 1.0).score(transcript)).total


async def test_success_is_the_verified_fact() -> None:
    assert await value_of(Success(), make_transcript({"success": 0.25})) == 0.25


@pytest.mark.parametrize("term", [Success(), Efficiency()])
async def test_without_a_verified_fact_there_is_no_score(term: Reward) -> None:
    with pytest.raises(RewardError, match="raised KeyError: 'success'"):
        await value_of(term, make_transcript({}))


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ((), 1.0),
        (((0, 0),), 1.0),
        (((1, 0), (1, 1)), 0.5),
        (((4, 1),), 0.75),
        (((2, 2),), 0.0),
        (((3, 0), (1, 1)), 0.75),
    ],
)
async def test_tool_validity_is_the_share_of_valid_calls(turns: tuple[tuple[int, int], ...], expected: float) -> None:
    assert await value_of(ToolValidity(), make_transcript(turns=turns)) == expected


@pytest.mark.parametrize(
    ("success", "num_turns", "budget", "expected"),
    [
        (1.0, 2, None, 0.75),
        (1.0, 8, None, 0.0),
        (0.5, 4, None, 0.25),
        (0.0, 1, None, 0.0),
        (1.0, 2, 4, 0.5),
        (1.0, 5, 4, 0),
    ],
)
async def test_efficiency_is_the_unused_share_of_the_budget_of_a_success(
    success: float, num_turns: int, budget: int | None, expected: float
) -> None:
    transcript = make_transcript({"success": success}, turns=((1, 0),) * num_turns, max_turns=8)
    assert await value_of(Efficiency(budget), transcript) == expected


@pytest.mark.parametrize("max_turns", [0, -1])
def test_a_budget_without_turns_is_refused(max_turns: int) -> None:
    with pytest.raises(ValueError, match=f"max_turns must be at least 1, not {max_turns}"):
        Efficiency(max_turns)


async def test_unsafe_is_the_count_and_zero_where_nothing_is_counted() -> None:
    assert await value_of(Unsafe(), make_transcript({"success": 0.0, "unsafe": 3.0})) == 3.0
    assert await value_of(Unsafe(), make_transcript({"success": 0.0})) == 0.0


@given(success=st.floats(0.01, 1), num_turns=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_no_fast_failure_beats_a_slow_success(success: float, num_turns: tuple[int, int]) -> None:
    stack = Success() * 1.0 + Efficiency() * 0.1
    totals = [
        asyncio.run(stack.score(make_transcript({"success": fact}, turns=((1, 0),) * num, max_turns=20))).total
        for fact, num in zip((0.0, success), num_turns, strict=True)
    ]
    assert totals[0] == 0.0 < totals[1]
