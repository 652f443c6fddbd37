"""What a reward says of itself: the algebra of stacks, and no two terms alike that score otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from palaestra.rewards import Efficiency, Reward, RewardStack, Success
from palaestra.types import Transcript
from tests.rewards.test_stack import VALUES, WEIGHTS, Fixed, stacks


class Colour(Enum):
    RED = 1
    BLUE = 2


class Held(Reward):
    """A term that keeps its argument to itself, and a count."""

    name = "held"
    scale = 1.0

    def __init__(self, given: Any) -> None:
        self._given = given
        self._num_asked = 0

    @property
    def shown(self) -> object:
        return object()

    async def value(self, transcript: Transcript) -> float:
        self._num_asked += 1
        return 0.0


class Doubled(Held):
    scale = 2.0


@dataclass(frozen=True)
class Limits:
    low: float
    high: float


class Settings(BaseModel):
    low: float


class Modelled(Reward, BaseModel):
    name: str = "modelled"
    limit: int

    async def value(self, transcript: Transcript) -> float:
        return 0.0


def one(text: str) -> float:
    return 1.0


def other(text: str) -> float:
    return 2.0


def round_trip(stack: RewardStack) -> Any:
    return json.loads(json.dumps(stack.describe(), allow_nan=False))


@given(stacks(), stacks())
def test_a_sum_says_what_its_parts_say_in_order(a: RewardStack, b: RewardStack) -> None:
    assert (a + b).describe() == a.describe() + b.describe()
    assert round_trip(a) == a.describe()


@given(stacks(), WEIGHTS)
def test_a_factor_is_said_of_each_weight_and_of_nothing_else(stack: RewardStack, factor: float) -> None:
    assert (stack * factor).describe() == [{**term, "weight": term["weight"] * factor} for term in stack.describe()]


@given(stacks(), VALUES, VALUES)
def test_a_gate_is_said_of_each_term_with_all_of_its_own_term_and_bound(
    stack: RewardStack, value: float, bound: float
) -> None:
    gate = {**Fixed(value).describe(), "comparison": "<=", "bound": bound}
    assert stack.when(Fixed(value) <= bound).describe() == [
        {**term, "when": [*term["when"], gate]} for term in stack.describe()
    ]


@given(st.none() | st.integers(1), st.none() | st.integers(1))
def test_terms_say_the_same_where_their_parameters_are_the_same_and_only_there(a: int | None, b: int | None) -> None:
    for wrapped in (
        lambda term: term * 1.0,
        lambda term: (Success() * 1.0).when(term > 0),
        lambda term: Held(term) * 1.0,
        lambda term: Held([term * 2.0, None]) * 1.0,
    ):
        assert (round_trip(wrapped(Efficiency(a))) == round_trip(wrapped(Efficiency(b)))) == (a == b)


@pytest.mark.parametrize(
    ("this", "that"),
    [
        (one, other),
        (partial(one, "a"), partial(one, "b")),
        (len, max),
        (Limits, Settings),
        (Limits(0, 1), Limits(0, 2)),
        (Settings(low=0), Settings(low=1)),
        (Colour.RED, Colour.BLUE),
        ({1, 2}, {1, 3}),
        (Path("a"), Path("b")),
        (b"a", b"b"),
        (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
        (np.float32(1), np.float32(2)),
        (math.inf, -math.inf),
        ({"a": (1, one)}, {"a": (1, other)}),
        (True, 0),
    ],
)
def test_parameters_of_any_kind_are_told_apart_and_come_back_the_same(this: Any, that: Any) -> None:
    assert round_trip(Held(this) * 1.0) == round_trip(Held(this) * 1.0) != round_trip(Held(that) * 1.0)


def test_what_a_term_is_and_holds_for_good_is_said_and_what_it_computes_or_counts_is_not() -> None:
    assert Held(math.nan).describe() == {
        "term": "held",
        "class": "tests.rewards.test_description.Held",
        "parameters": {"given": "nan", "scale": 1.0},
    }
    assert Doubled(1).describe()["parameters"]["scale"] == 2.0
    assert Doubled(1).describe()["class"] != Held(1).describe()["class"]
    assert Modelled(limit=3).describe()["parameters"] == {"limit": 3}
    assert Held(object()).describe()["parameters"]["given"] == {"class": "builtins.object"}


@pytest.mark.parametrize("make", [lambda: {"z", "a", "m"}, lambda: frozenset((Limits(0, 1), Limits(1, 2)))])
def test_a_set_is_said_in_one_order(make: Callable[[], Any]) -> None:
    described: Mapping[str, Any] = Held(make()).describe()["parameters"]
    assert described["given"] == sorted(described["given"], key=json.dumps)
