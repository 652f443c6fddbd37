"""Full tasks: a real function with one or two bugs, its docstring, examples, and hidden tests.

Invariants: every bug of `mutants.json`, and every pair of them that is drawn, was seen to fail its function's
visible and hidden tests within the time limit; a bug belongs to one split, so none of one split occurs in another.
"""

from __future__ import annotations

import ast
import itertools
import json
import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from palaestra.envs.code._algorithms import Algorithm
from palaestra.envs.code._algorithms_numbers import NUMBER_ALGORITHMS
from palaestra.envs.code._algorithms_text import TEXT_ALGORITHMS
from palaestra.envs.code._mutations import mutate, rename_variables
from palaestra.envs.code._splits import rng_of, split_of
from palaestra.types import Split

SOLUTION_FILE = "solution.py"
MUTANTS_PATH = Path(__file__).with_name("mutants.json")
ALGORITHMS: dict[str, Algorithm] = {item.name: item for item in (*NUMBER_ALGORITHMS, *TEXT_ALGORITHMS)}

_TWO_BUGS_SHARE = 0.3
_RENAMED_SHARE = 0.5


def make_full_data(split: Split, index: int) -> dict[str, Any]:
    """The data of one full task; a pure function of its arguments."""
    rng = rng_of("full", split, index)
    name, bugs = rng.choice(bug_sets(split, 2 if rng.random() < _TWO_BUGS_SHARE else 1))
    chosen = ALGORITHMS[name]
    names = _draw_names(chosen.source, rng) if rng.random() < _RENAMED_SHARE else {}
    visible, hidden = chosen.tests
    return {
        "form": "full",
        "request": _request(chosen),
        "source": rename_variables(mutate(chosen.source, list(bugs)), names),
        "solution": rename_variables(chosen.source, names),
        "bugs": list(bugs),
        "visible": visible.to_json(),
        "hidden": hidden.to_json(),
    }


@cache
def known_mutants() -> dict[str, dict[str, list[Any]]]:
    """For each function its verified single `bugs`, and the `cancelling` pairs of them, which pass the tests."""
    table: dict[str, dict[str, list[Any]]] = json.loads(MUTANTS_PATH.read_text())
    return table


@cache
def bug_sets(split: Split, size: int) -> list[tuple[str, tuple[str, ...]]]:
    """All (function, bugs) of a split with `size` bugs, in a fixed order."""
    found = []
    for name, entry in sorted(known_mutants().items()):
        ours = [bug for bug in entry["bugs"] if split_of(f"{name} {bug}") == split]
        refused = {tuple(pair) for pair in entry["cancelling"]}
        found += [(name, bugs) for bugs in combinations_of(ours, size) if bugs not in refused]
    return found


def combinations_of(bugs: Iterable[str], size: int) -> list[tuple[str, ...]]:
    """All ways to choose `size` bugs at different places."""
    chosen = itertools.combinations(bugs, size)
    return [names for names in chosen if len({name.rpartition("/")[0] for name in names}) == size]


def _request(chosen: Algorithm) -> str:
    docstring = ast.get_docstring(ast.parse(chosen.source).body[0])  # type: ignore[arg-type]
    tests, _ = chosen.tests
    examples = "\n".join(f"{tests.describe_call(k)} should give {tests.expected[k]}" for k in range(2))
    return f"Repair the function {chosen.name} in {SOLUTION_FILE}.\n\n{docstring}\n\nExamples:\n{examples}"


def _draw_names(source: str, rng: random.Random) -> dict[str, str]:
    """New names for the function's own variables, parameters excepted."""
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    parameters = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    stored = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    variables = sorted(stored - parameters)
    return dict(zip(variables, rng.sample(_NAMES, len(variables)), strict=True))


_NAMES = ("acc", "cur", "item", "k", "m", "n", "out", "p", "q", "r", "s", "tmp", "u", "v", "w", "z")
