"""What may change between two starts of a run: every key has one rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError, LedgerError
from palaestra.rewards import Efficiency, Success
from palaestra.trainer import Trainer
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.run_rules import as_recorded, check_allowed, compare, rule_of
from tests.toys import register_echo

register_echo()

SUITE: dict[str, Any] = {"suite": {"weights": {"a/A-v0": 1.0}, "form": "full"}}
WIDER: dict[str, Any] = {"suite": {"weights": {"a/A-v0": 1.0, "b/B-v0": 2.0}, "form": "full"}}


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


def test_the_order_of_weights_is_a_change_for_the_sampler_draws_by_it() -> None:
    turned = {"suite": {"weights": dict(reversed(WIDER["suite"]["weights"].items())), "form": "full"}}
    with pytest.raises(LedgerError, match=r"with suite\.weights in this order = \['a/A-v0', 'b/B-v0'\], not .*--allow"):
        compare(WIDER, turned, allow=())
    assert len(compare(WIDER, turned, allow=("suite",))) == 1
    assert compare({"suite": {"options": {"a": 1, "b": 2}}}, {"suite": {"options": {"b": 2, "a": 1}}}, allow=()) == []


def test_a_parameter_of_a_reward_is_a_change_and_told_by_its_place() -> None:
    before, now = (
        {"suite": EnvSuite({"test/Echo-v0": 1.0}, reward=Success() + Efficiency(max_turns=turns) * 0.1).describe()}
        for turns in (8, 64)
    )
    with pytest.raises(LedgerError, match=r"parameters\.max_turns = 8, not 64: .*--allow suite"):
        compare(before, now, allow=())
    assert compare(before, now, allow=("suite",)) == [
        "suite.rewards.[1].parameters.max_turns changed from 8 to 64",
    ]
    fewer = {"suite": EnvSuite({"test/Echo-v0": 1.0}, reward=Success() * 1.0).describe()}
    assert len(compare(before, fewer, allow=("suite",))) == 1


def test_a_tuple_is_the_list_that_the_ledger_gives_back() -> None:
    recorded = {"suite": {"options": {"a/A-v0": {"sizes": [1, 2]}}}}
    wanted = {"suite": {"options": {"a/A-v0": {"sizes": (1, 2)}}}}
    assert compare(recorded, wanted, allow=()) == []
    with pytest.raises(ConfigError, match=r"keeps its suite as JSON.*Object of type set"):
        as_recorded({"suite": {"options": {"a/A-v0": {"sizes": {1, 2}}}}})


def test_what_cannot_be_allowed_is_named_before_anything_is_opened(tmp_path: Path) -> None:
    check_allowed(("suite",))
    with pytest.raises(ConfigError, match="allow names 'suit', which no rule asks for; did you mean 'suite'"):
        Trainer("model", run=tmp_path / "run", allow=("suite", "suit"))
    with pytest.raises(ConfigError, match=r"allow names 'seed', .*; valid: suite"):
        check_allowed(("seed",))
    assert list(tmp_path.iterdir()) == []
