"""What a full task is made of: a right function, and how to draw arguments for it.

Invariant: a function uses nothing outside itself, ends quickly on what its `draw` gives, and returns JSON.
"""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from palaestra.envs.code._splits import rng_of
from palaestra.envs.code._tests import Tests, make_tests

_NUM_VISIBLE, _NUM_HIDDEN = 6, 32

Draw = Callable[[random.Random], tuple[Any, ...]]


@dataclass(frozen=True)
class Algorithm:
    """A right function and the distribution of its arguments."""

    function: Callable[..., Any]
    draw: Draw

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @cached_property
    def source(self) -> str:
        """The function as it is shown: normalised, without its decorator."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.function)))
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef)
        definition.decorator_list = []
        return ast.unparse(tree) + "\n"

    @cached_property
    def tests(self) -> tuple[Tests, Tests]:
        """Visible and hidden tests, the same in every task on this function, no call in both."""
        rng = rng_of("tests", self.name)
        calls: dict[str, tuple[Any, ...]] = {}
        for _ in range(100 * (_NUM_VISIBLE + _NUM_HIDDEN)):
            call = self.draw(rng)
            calls.setdefault(repr(call), call)
        kept = list(calls.values())[: _NUM_VISIBLE + _NUM_HIDDEN]
        visible, hidden = kept[:_NUM_VISIBLE], kept[_NUM_VISIBLE:]
        return make_tests(self.name, self.function, visible), make_tests(self.name, self.function, hidden)


def algorithm(draw: Draw) -> Callable[[Callable[..., Any]], Algorithm]:
    """Make an `Algorithm` of a function; `draw` gives the arguments of one call."""
    return lambda function: Algorithm(function, draw)


def text_of(rng: random.Random, letters: str, low: int, high: int) -> str:
    """A random text of `low` to `high` letters."""
    return "".join(rng.choice(letters) for _ in range(rng.randint(low, high)))


def ints(rng: random.Random, low: int, high: int, *, most: int, least: int = 0) -> list[int]:
    """A random list of `least` to `most` integers within `low..high`."""
    return [rng.randint(low, high) for _ in range(rng.randint(least, most))]
