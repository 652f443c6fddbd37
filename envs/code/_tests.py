"""Tests of a function, as values: what it is called with and what it must give, in JSON.

Invariant: the expected values stay on the host; a sandbox is only ever sent the calls.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from palaestra.types import JsonObject


@dataclass(frozen=True, slots=True)
class Tests:
    """Calls of one function, and the value that each must give, as canonical JSON text."""

    function: str
    calls: tuple[tuple[Any, ...], ...]
    expected: tuple[str, ...]

    __test__ = False

    def __len__(self) -> int:
        return len(self.calls)

    def to_json(self) -> dict[str, Any]:
        """The tests as a plain JSON object."""
        expected = [json.loads(text) for text in self.expected]
        return {"function": self.function, "calls": [list(call) for call in self.calls], "expected": expected}

    @staticmethod
    def from_json(value: JsonObject) -> Tests:
        """Inverse of `to_json`."""
        return Tests(value["function"], tuple(map(tuple, value["calls"])), tuple(map(canonical, value["expected"])))

    def describe_call(self, position: int) -> str:
        """Call `position` as a reader would write it, such as `gcd(12, 18)`."""
        return f"{self.function}({', '.join(map(repr, self.calls[position]))})"


def make_tests(function: str, right: Callable[..., object], calls: Iterable[tuple[Any, ...]]) -> Tests:
    """Tests whose expected values come from `right`, our own reference."""
    kept = tuple(calls)
    # a reference may change its arguments in place
    expected = tuple(canonical(right(*copy.deepcopy(call))) for call in kept)
    return Tests(function, kept, expected)


def canonical(value: object) -> str:
    """One text per JSON value: `1`, `1.0` and `true` differ, a tuple is a list, key order does not count."""
    return json.dumps(value, sort_keys=True)
