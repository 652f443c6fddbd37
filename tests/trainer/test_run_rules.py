"""What may change between two starts of a run: every key has one rule."""

from __future__ import annotations

import pytest

from palaestra.errors import LedgerError
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.run_rules import compare, rule_of

SUITE = {"suite": {"weights": {"a/A-v0": 1.0}, "form": "full"}}
WIDER = {"suite": {"weights": {"a/A-v0": 1.0, "b/B-v0": 2.0}, "form": "full"}}


def settings(**changes: object) -> dict[str, object]:
    return {"train": GRPOConfig.parse(changes).model_dump(mode="json")}


@pytest.mark.parametrize(
    "changes",
    [
        {"learner": {"device": "gpu"}},
        {"learner": {"threads": 2}},
        {"engine_config": {"threads": 2}},
        {"concurrency": 3},
        {"steps": 7},
        {"engine": "transformers"},
    ],
)
def test_what_is_free_is_taken_over_in_a_line(changes: dict[str, object]) -> None:
    lines = compare(settings(), settings(**changes), allow=())
    assert len(lines) == 1
    assert " changed from " in lines[0]
    assert lines[0].startswith("train.")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ({"model": "sha256:1"}, {"model": "sha256:2"}, "model"),
        ({"seed": 0}, {"seed": 1}, "seed"),
        (settings(), settings(seed=1), "train.seed"),
        (settings(), settings(family="qwen3"), "train.family"),
        (settings(), settings(learner={"seed": 1}), "train.learner.seed"),
    ],
)
def test_what_is_fixed_is_refused_whatever_is_allowed(old: dict[str, object], new: dict[str, object], key: str) -> None:
    with pytest.raises(LedgerError, match=f"started with {key} = .*use another run folder"):
        compare(old, new, allow=("model", "seed", "train", "suite"))


def test_a_declared_change_needs_its_name() -> None:
    with pytest.raises(LedgerError, match="--allow suite"):
        compare(SUITE, WIDER, allow=())
    assert compare(SUITE, WIDER, allow=("suite",)) == ["suite.weights.b/B-v0 changed from None to 2.0"]


def test_the_same_says_nothing_and_unknown_keys_are_free() -> None:
    assert compare({**SUITE, **settings()}, {**SUITE, **settings()}, allow=()) == []
    assert rule_of("train.some.later.key") == "free"
    assert compare({"train": {"gone": 1}}, {"train": {}}, allow=()) == ["train.gone changed from 1 to None"]
