"""The compact language: a phrase of a closed vocabulary for each line of Python.

A function is two to four lines; phrase k of its spec says what line k should do, word by word the same way
everywhere, and both are numbered. Invariants: a broken line is itself a line of the language, the right one
with one thing changed, so that a repair is found by comparing phrases with lines and written in words that
were seen before; no constant is also the number of a line.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

FUNCTION = "f"
MAX_WORDS = 14
"""Most words of a spec, the numbers of its phrases included."""

_FIRST = {
    "plus": ("{0} plus {1}", "{0} + {1}"),
    "minus": ("{0} minus {1}", "{0} - {1}"),
    "times": ("{0} times {1}", "{0} * {1}"),
    "max": ("max {0} {1}", "max ( {0} , {1} )"),
    "min": ("min {0} {1}", "min ( {0} , {1} )"),
    "sum_all": ("sum {0}", "sum ( {0} )"),
    "count_all": ("count {0}", "len ( {0} )"),
    "max_all": ("max {0}", "max ( {0} )"),
    "min_all": ("min {0}", "min ( {0} )"),
}
_LATER = {
    "plus": ("plus {0}", "t + {0}"),
    "minus": ("minus {0}", "t - {0}"),
    "from": ("from {0}", "{0} - t"),
    "times": ("times {0}", "t * {0}"),
    "mod": ("mod {0}", "t % {0}"),
    "cap": ("cap {0}", "min ( t , {0} )"),
    "floor": ("floor {0}", "max ( t , {0} )"),
}
_RESET = {
    "zero_above": ("zero above {0}", "if t > {0} : t = 0"),
    "zero_below": ("zero below {0}", "if t < {0} : t = 0"),
}
_TEST = {
    "above": ("above {0}", "t > {0}"),
    "below": ("below {0}", "t < {0}"),
    "equals": ("equals {0}", "t == {0}"),
}
_CONFUSED = (
    ("plus", "minus", "times"),
    ("minus", "from"),
    ("times", "mod"),
    ("max", "min"),
    ("sum_all", "count_all", "max_all", "min_all"),
    ("cap", "floor"),
    ("zero_above", "zero_below"),
    ("above", "below", "equals"),
)
"""Operations that somebody mistakes for each other."""

_CONSTANTS = {"times": range(5, 10), "mod": range(5, 10)}
_ANY_CONSTANT = range(5, 21)
_VARIABLES = ("x", "y")
_TAKE_VARIABLES = ("plus", "minus", "times", "cap", "floor")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a function: an operation, what it works on, and where it stands."""

    operation: str
    operands: tuple[str, ...]
    is_first: bool = False
    is_last: bool = False

    @property
    def phrase(self) -> str:
        """The words of the spec for this line."""
        return self._pair()[0].format(*self.operands)

    @property
    def code(self) -> str:
        """The Python of this line, tokens apart by one space."""
        text = self._pair()[1].format(*self.operands)
        if self.operation in _RESET:
            return text
        return f"return {text}" if self.is_last else f"t = {text}"

    def _pair(self) -> tuple[str, str]:
        if self.is_first:
            return _FIRST[self.operation]
        return (_LATER | _RESET | _TEST)[self.operation]


def spec_of(lines: Sequence[Line]) -> str:
    """The whole spec: the numbered phrases, such as `1 x plus y 2 times 5`."""
    return number_lines([line.phrase for line in lines])


def number_lines(texts: Sequence[str]) -> str:
    """Texts in one line, each after its number, which starts from 1."""
    return " ".join(f"{number} {text}" for number, text in enumerate(texts, start=1))


def source_of(codes: Sequence[str]) -> str:
    """The function as Python source."""
    return "\n".join([f"def {FUNCTION} ( x , y , a ) :", *(f"    {code}" for code in codes)]) + "\n"


def trace_source_of(codes: Sequence[str]) -> str:
    """A function that gives the value of `t` after each line but the last, as a list."""
    steps = [f"    {line}" for code in codes[:-1] for line in (code, "trace.append(t)")]
    return "\n".join([f"def {FUNCTION} ( x , y , a ) :", "    trace = []", *steps, "    return trace"]) + "\n"


def draw_lines(rng: random.Random) -> list[Line]:
    """A random function whose spec has at most `MAX_WORDS` words."""
    while True:
        count = rng.choices((2, 3, 4), (3, 6, 1))[0]
        lines = [_draw_first(rng), *(_draw_later(rng, is_last=k == count - 1) for k in range(1, count))]
        if len(spec_of(lines).split()) <= MAX_WORDS:
            return lines


def mistakes(line: Line) -> list[Line]:
    """Every plausible wrong version of a line: operation, order, variable or constant."""
    found = [replace(line, operation=other) for other in _mistaken_operations(line)]
    if line.is_first and len(line.operands) == 2:
        one, two = line.operands
        found += [replace(line, operands=operands) for operands in ((two, one), (one, one), (two, two))]
    for constant in _near_constants(line):
        found.append(replace(line, operands=(constant,)))
    if not line.is_first and line.operands[0] in _VARIABLES:
        found.append(replace(line, operands=("y" if line.operands[0] == "x" else "x",)))
    return found


def _draw_first(rng: random.Random) -> Line:
    operation = rng.choice(list(_FIRST))
    operands = ("a",) if operation.endswith("_all") else rng.choice((("x", "y"), ("y", "x")))
    return Line(operation, operands, is_first=True)


def _draw_later(rng: random.Random, *, is_last: bool) -> Line:
    operation = rng.choice([*_LATER, *(_TEST if is_last else _RESET)])
    if operation in _TAKE_VARIABLES and rng.random() < 0.25:
        return Line(operation, (rng.choice(_VARIABLES),), is_last=is_last)
    return Line(operation, (str(rng.choice(_CONSTANTS.get(operation, _ANY_CONSTANT))),), is_last=is_last)


def _mistaken_operations(line: Line) -> list[str]:
    allowed = _FIRST if line.is_first else _LATER | (_TEST if line.is_last else _RESET)
    others = {other for names in _CONFUSED if line.operation in names for other in names if other != line.operation}
    if line.operands[0] in _VARIABLES and not line.is_first:
        others &= set(_TAKE_VARIABLES)  # `t % x` could divide by zero
    return [other for other in allowed if other in others]


def _near_constants(line: Line) -> list[str]:
    if not line.operands[0].isdecimal():
        return []
    value = int(line.operands[0])
    allowed = _CONSTANTS.get(line.operation, _ANY_CONSTANT)
    return [str(value + step) for step in (-3, -2, -1, 1, 2, 3) if value + step in allowed]
