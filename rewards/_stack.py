"""Composition of reward terms: weighted sums and gates, written as algebra.

`Success() * 1.0 + Efficiency() * 0.1 - Unsafe() * 1.0` is a stack, and so is `stack.when(Success() > 0)`.
Invariants: a stack's total is the sum of its terms' contributions; a gate that is shut sets every
contribution to 0 and leaves the raw values; a term that raises or has no finite value raises
`RewardError`, never 0. Composition is associative, and terms keep the order in which they were written.
A term object is asked once for each episode, however often it stands in the stack and its gates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from palaestra.errors import RewardError
from palaestra.rewards._description import class_of, parameters_of
from palaestra.types import RewardTerm, Transcript

Comparison = Literal[">", ">=", "<", "<="]


@dataclass(frozen=True, slots=True)
class Score:
    """What a stack says of one episode: the total and every term."""

    total: float
    terms: tuple[RewardTerm, ...]


class Reward(ABC):
    """One scoring term over a finished episode. Subclass it with `name` and `value`."""

    name: str

    @abstractmethod
    async def value(self, transcript: Transcript) -> float | None:
        """The raw value; `None` when there is nothing to say, which makes the episode unscorable."""

    def describe(self) -> dict[str, Any]:
        """What the term is, as JSON: name, class and parameters. Terms that score otherwise say otherwise."""
        return {"term": self.name, "class": class_of(self), "parameters": parameters_of(self)}

    def __mul__(self, weight: float) -> RewardStack:
        return RewardStack(((self, float(weight)),))

    __rmul__ = __mul__

    def __add__(self, other: Reward | RewardStack) -> RewardStack:
        return self * 1.0 + other

    def __sub__(self, other: Reward | RewardStack) -> RewardStack:
        return self * 1.0 - other

    def __neg__(self) -> RewardStack:
        return self * -1.0

    def __gt__(self, bound: float) -> Gate:
        return Gate(self, ">", bound)

    def __ge__(self, bound: float) -> Gate:
        return Gate(self, ">=", bound)

    def __lt__(self, bound: float) -> Gate:
        return Gate(self, "<", bound)

    def __le__(self, bound: float) -> Gate:
        return Gate(self, "<=", bound)


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition on a term: the stack behind it counts only where it holds."""

    reward: Reward
    comparison: Comparison
    bound: float

    def is_open(self, value: float) -> bool:
        """Whether the condition holds for a value of its term."""
        if self.comparison == ">":
            return value > self.bound
        if self.comparison == ">=":
            return value >= self.bound
        if self.comparison == "<":
            return value < self.bound
        return value <= self.bound

    def describe(self) -> dict[str, Any]:
        """The term that is looked at, and the condition."""
        return {**self.reward.describe(), "comparison": self.comparison, "bound": self.bound}


@dataclass(frozen=True, slots=True)
class RewardStack:
    """A weighted sum of terms behind any number of gates. Immutable; operators give new stacks."""

    weighted: tuple[tuple[Reward, float], ...]
    gates: tuple[tuple[Gate, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.gates:
            object.__setattr__(self, "gates", ((),) * len(self.weighted))
        if len(self.gates) != len(self.weighted):
            raise ValueError(f"{len(self.weighted)} terms with {len(self.gates)} tuples of gates")
        for reward, weight in self.weighted:
            if not math.isfinite(weight):
                raise ValueError(f"weight of {reward.name} is {weight}")

    def __add__(self, other: Reward | RewardStack) -> RewardStack:
        other = other * 1.0
        return RewardStack(self.weighted + other.weighted, self.gates + other.gates)

    def __sub__(self, other: Reward | RewardStack) -> RewardStack:
        return self + other * -1.0

    def __mul__(self, factor: float) -> RewardStack:
        scaled = tuple((reward, weight * factor) for reward, weight in self.weighted)
        return replace(self, weighted=scaled)

    __rmul__ = __mul__

    def __neg__(self) -> RewardStack:
        return self * -1.0

    def when(self, gate: Gate) -> RewardStack:
        """The same stack, counted only on episodes where `gate` holds."""
        return replace(self, gates=tuple((*gates, gate) for gates in self.gates))

    def describe(self) -> list[dict[str, Any]]:
        """The terms as JSON: what each is (see `Reward.describe`), its weight, and its gates."""
        return [
            {**reward.describe(), "weight": weight, "when": [gate.describe() for gate in gates]}
            for (reward, weight), gates in zip(self.weighted, self.gates, strict=True)
        ]

    async def score(self, transcript: Transcript) -> Score:
        """Total and terms of one episode; raises `RewardError` when a term cannot say."""
        known = _Values(transcript)
        terms = []
        for (reward, weight), gates in zip(self.weighted, self.gates, strict=True):
            value = await known.of(reward)
            is_open = all([gate.is_open(await known.of(gate.reward)) for gate in gates])
            contribution = weight * value if is_open else 0.0
            terms.append(RewardTerm(name=reward.name, value=value, weight=weight, contribution=contribution))
        return Score(_sum(terms), tuple(terms))


class _Values:
    """Each term's value on one episode: a judge that is asked twice may answer twice, and costs twice."""

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript
        self._by_term: dict[int, float] = {}

    async def of(self, reward: Reward) -> float:
        if id(reward) not in self._by_term:
            self._by_term[id(reward)] = await _evaluate(reward, self._transcript)
        return self._by_term[id(reward)]


def _sum(terms: Sequence[RewardTerm]) -> float:
    try:
        total = math.fsum(term.contribution for term in terms)
    except (OverflowError, ValueError):  # beyond the largest float, or infinities of both signs
        total = math.nan
    if not math.isfinite(total):
        raise RewardError(f"the terms {[term.name for term in terms]} sum to no finite number")
    return total


async def _evaluate(reward: Reward, transcript: Transcript) -> float:
    try:
        value = await reward.value(transcript)
        number = math.nan if value is None else float(value)
    except Exception as error:  # a user's term may raise or return anything; the episode becomes unscorable
        raise RewardError(f"{reward.name} raised {type(error).__name__}: {error}") from error
    if not math.isfinite(number):
        raise RewardError(f"{reward.name} gave {value} on task {transcript.task.id}")
    return number
