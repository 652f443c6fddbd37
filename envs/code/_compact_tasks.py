"""Compact tasks: a spec of phrases, and lines of Python of which one or two disagree with it.

Invariants: a spec belongs to one split; the broken function, and every partly repaired one, fails both the
visible and the hidden tests; the tests tell the right function from a constant.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from palaestra.envs.code._phrases import FUNCTION, Line, draw_lines, mistakes, source_of, spec_of, trace_source_of
from palaestra.envs.code._splits import rng_of, split_of
from palaestra.envs.code._tests import Tests, canonical, make_tests
from palaestra.types import Split

_NUM_VISIBLE, _NUM_HIDDEN = 8, 16
_TWO_BUGS_SHARE = 0.15


def make_compact_data(split: Split, index: int) -> dict[str, Any]:
    """The data of one compact task; a pure function of its arguments."""
    rng = rng_of("compact", split, index)
    while True:
        lines = draw_lines(rng)
        if split_of(spec_of(lines)) != split:
            continue
        data = _break(lines, rng)
        if data is not None:
            return data


def _break(lines: Sequence[Line], rng: random.Random) -> dict[str, Any] | None:
    """A task whose solution is `lines`; None when the drawn bug or the drawn tests do not serve."""
    codes = [line.code for line in lines]
    right = _function(codes)
    calls = [_draw_call(rng) for _ in range(_NUM_VISIBLE + _NUM_HIDDEN)]
    visible = make_tests(FUNCTION, right, calls[:_NUM_VISIBLE])
    hidden = make_tests(FUNCTION, right, calls[_NUM_VISIBLE:])
    if len(set(hidden.expected)) < 2:
        return None
    num_bugs = 2 if rng.random() < _TWO_BUGS_SHARE else 1
    wrong = {number: rng.choice(mistakes(lines[number])).code for number in rng.sample(range(len(lines)), num_bugs)}
    for kept in _subsets(wrong):
        mutant = _function([wrong[k] if k in kept else code for k, code in enumerate(codes)])
        if not (_differs(mutant, visible) and _differs(mutant, hidden)):
            return None
    return {
        "form": "compact",
        "spec": spec_of(lines),
        "lines": [wrong.get(number, code) for number, code in enumerate(codes)],
        "solution": codes,
        "visible": visible.to_json(),
        "hidden": hidden.to_json(),
        "steps": make_tests(FUNCTION, _function_of(trace_source_of(codes)), calls[:_NUM_VISIBLE]).to_json(),
    }


def _subsets(wrong: dict[int, str]) -> list[tuple[int, ...]]:
    return [kept for size in range(1, len(wrong) + 1) for kept in itertools.combinations(wrong, size)]


def _draw_call(rng: random.Random) -> tuple[int, int, list[int]]:
    x, y = rng.sample(range(1, 21), 2)
    return x, y, [rng.randint(1, 20) for _ in range(rng.randint(2, 4))]


def _function(codes: Sequence[str]) -> Callable[..., object]:
    return _function_of(source_of(codes))


def _function_of(source: str) -> Callable[..., object]:
    # only ever lines of our own language: no loops, no names but x, y, a, t and four builtins
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    function: Callable[..., object] = namespace[FUNCTION]
    return function


def _differs(mutant: Callable[..., object], tests: Tests) -> bool:
    return any(canonical(mutant(*call)) != text for call, text in zip(tests.calls, tests.expected, strict=True))
