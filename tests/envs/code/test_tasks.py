"""Tasks: pure functions of split and index, disjoint by content, with bugs that are bugs."""

from __future__ import annotations

import json
import random

import pytest

from palaestra.envs.code import CodeRepair
from palaestra.envs.code._compact_tasks import make_compact_data
from palaestra.envs.code._full_tasks import ALGORITHMS, bug_sets, known_mutants, make_full_data
from palaestra.envs.code._mutations import mutate, mutation_names, rename_variables
from palaestra.envs.code._phrases import MAX_WORDS, Line, draw_lines, mistakes, source_of, spec_of
from palaestra.envs.code._splits import split_of
from palaestra.envs.code._survey import fails_its_tests
from palaestra.envs.code._tests import Tests, canonical
from palaestra.envs.code._workspace import Workspace
from palaestra.types import Form, Split

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.mark.parametrize("form", ["compact", "full"])
def test_the_same_index_gives_the_same_bytes(form: Form) -> None:
    one, two = CodeRepair(form=form), CodeRepair(form=form)
    for split in _SPLITS:
        for index in (0, 7, 999):
            assert json.dumps(one.make_task(split, index).data) == json.dumps(two.make_task(split, index).data)


def test_a_compact_task_is_what_it_was_when_the_version_was_published() -> None:
    data = make_compact_data("train", 0)
    assert data["spec"] == "1 x plus y 2 floor 7 3 mod 9"
    assert data["lines"] == ["t = x + y", "t = max ( t , 7 )", "return t % 7"]
    assert data["solution"] == ["t = x + y", "t = max ( t , 7 )", "return t % 9"]


def test_compact_splits_share_no_spec_and_hardly_repeat_themselves() -> None:
    specs = {split: [make_compact_data(split, index)["spec"] for index in range(400)] for split in _SPLITS}
    sets = [set(specs[split]) for split in _SPLITS]
    assert len(set().union(*sets)) == sum(map(len, sets))
    assert all(len(found) > 300 for found in sets)


def test_full_splits_share_no_bug() -> None:
    bugs = {split: {(name, bug) for name, [bug] in bug_sets(split, 1)} for split in _SPLITS}
    assert len(set().union(*bugs.values())) == sum(map(len, bugs.values()))
    for split in _SPLITS:
        assert {(name, bug) for name, pair in bug_sets(split, 2) for bug in pair} <= bugs[split]
    assert len({make_full_data("train", index)["source"] for index in range(2000)}) > 1000


def test_compact_specs_are_short_and_their_lines_few() -> None:
    for index in range(300):
        data = make_compact_data("train", index)
        assert len(data["spec"].split()) <= MAX_WORDS
        assert 2 <= len(data["lines"]) <= 4
        wrong = [one != two for one, two in zip(data["lines"], data["solution"], strict=True)]
        assert sum(wrong) in (1, 2)


def test_each_phrase_has_one_line_whatever_surrounds_it() -> None:
    rng = random.Random(0)
    code_of: dict[tuple[str, bool, bool], str] = {}
    for _ in range(2000):
        for line in draw_lines(rng):
            assert code_of.setdefault((line.phrase, line.is_first, line.is_last), line.code) == line.code


def test_no_constant_is_also_the_number_of_a_line() -> None:
    rng = random.Random(1)
    for line in (line for _ in range(500) for line in draw_lines(rng)):
        for version in (line, *mistakes(line)):
            assert not {"1", "2", "3", "4"} & set(f"{version.phrase} {version.code}".split())


def test_phrases_and_lines_by_hand() -> None:
    lines = [Line("max", ("x", "y"), is_first=True), Line("zero_above", ("5",)), Line("from", ("20",), is_last=True)]
    assert spec_of(lines) == "1 max x y 2 zero above 5 3 from 20"
    assert source_of([line.code for line in lines]) == (
        "def f ( x , y , a ) :\n    t = max ( x , y )\n    if t > 5 : t = 0\n    return 20 - t\n"
    )
    wrong = {line.code for line in mistakes(lines[2])}
    assert wrong == {"return t - 20", "return 17 - t", "return 18 - t", "return 19 - t"}


def test_split_depends_on_the_content_alone() -> None:
    found = [split_of(f"content {number}") for number in range(5000)]
    assert [round(found.count(split) / 5000, 1) for split in _SPLITS] == [0.8, 0.1, 0.1]


def test_canonical_text_tells_types_apart() -> None:
    assert len({canonical(value) for value in (1, 1.0, True, "1", [1], None)}) == 6
    assert canonical((1, 2)) == canonical([1, 2])
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1})


def test_tests_survive_json() -> None:
    for data in (make_compact_data("train", 3), make_full_data("train", 3)):
        tests = Tests.from_json(data["hidden"])
        assert tests.to_json() == json.loads(json.dumps(data["hidden"]))
        assert len(tests) >= 16


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_examples_and_hidden_tests_have_no_call_in_common(name: str) -> None:
    visible, hidden = ALGORITHMS[name].tests
    assert len(visible) == 6
    assert len(hidden) == 32
    assert not {repr(call) for call in visible.calls} & {repr(call) for call in hidden.calls}
    assert len(set(hidden.expected)) >= 2


def test_mutations_by_hand() -> None:
    source = "def f(a):\n    if not a < 2:\n        return a - 1\n    return max(a, 0)\n"
    assert len(mutation_names(source)) == len(set(mutation_names(source)))
    mutants = {mutate(source, [name]) for name in mutation_names(source)}
    assert source.replace("<", "<=") in mutants
    assert source.replace("not ", "") in mutants
    assert source.replace("a - 1", "1 - a") in mutants
    assert source.replace("max", "min") in mutants
    with pytest.raises(KeyError):
        mutate(source, ["compare/99/Lt"])


def test_renaming_changes_names_and_nothing_else() -> None:
    assert rename_variables("def f(a):\n    b = a\n    return b\n", {"b": "out"}) == (
        "def f(a):\n    out = a\n    return out\n"
    )


def test_every_function_has_bugs_and_the_table_names_real_ones() -> None:
    assert set(known_mutants()) == set(ALGORITHMS)
    for name, entry in known_mutants().items():
        assert len(entry["bugs"]) >= 2
        assert set(entry["bugs"]) <= set(mutation_names(ALGORITHMS[name].source))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
async def test_every_bug_fails_and_every_function_passes(name: str, workspace: Workspace) -> None:
    chosen = ALGORITHMS[name]
    for tests in chosen.tests:
        assert (await workspace.grade(chosen.source, tests, wall_s=2.0)).is_passed
    for bug in known_mutants()[name]["bugs"]:
        assert await fails_its_tests(workspace, chosen, [bug]), bug


async def test_compact_bugs_fail_in_the_sandbox_and_solutions_pass(workspace: Workspace) -> None:
    for index in range(60):
        data = make_compact_data("train", index)
        for tests in (Tests.from_json(data["visible"]), Tests.from_json(data["hidden"])):
            assert not (await workspace.grade(source_of(data["lines"]), tests, wall_s=2.0)).is_passed
            assert (await workspace.grade(source_of(data["solution"]), tests, wall_s=2.0)).is_passed
