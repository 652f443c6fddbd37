"""Configuration: what loads is complete; what is refused is explained in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator

from palaestra.config import Config, load_toml, nearest, override
from palaestra.errors import ConfigError


class Inner(Config):
    learning_rate: float = 1e-3
    """Step size, above 0."""


class Outer(Config):
    steps: int = Field(gt=0)
    """Updates."""
    rl: Inner = Inner()
    """Reinforcement learning."""
    sft: Inner | None = None
    """Imitation, if any."""

    @field_validator("steps")
    @classmethod
    def _is_even(cls, steps: int) -> int:
        if steps % 2:
            raise ValueError(f"steps must be even, not {steps}")
        return steps


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        Outer.parse(values, source="run.toml")
    return str(caught.value)


def test_what_is_valid_loads_with_its_defaults() -> None:
    config = Outer.parse({"steps": 4, "rl": {"learning_rate": 0.1}})
    assert (config.steps, config.rl.learning_rate, config.sft) == (4, 0.1, None)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Outer(steps=2).steps = 4


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"steps": 2, "step": 3}, "run.toml: unknown key 'step'; did you mean 'steps'?"),
        ({"steps": 2, "zzz": 3}, "run.toml: unknown key 'zzz'; valid: rl, sft, steps"),
        (
            {"steps": 2, "rl": {"learning_rat": 1}},
            "run.toml: unknown key 'rl.learning_rat'; did you mean 'learning_rate'?",
        ),
        (
            {"steps": 2, "sft": {"learning_rat": 1}},
            "run.toml: unknown key 'sft.learning_rat'; did you mean 'learning_rate'?",
        ),
        ({}, "run.toml: steps: Field required"),
        ({"steps": 0}, "run.toml: steps: Input should be greater than 0"),
        ({"steps": 3}, "run.toml: steps: steps must be even, not 3"),
    ],
)
def test_a_refusal_names_the_key_and_what_would_do(values: dict[str, Any], line: str) -> None:
    assert refusal(values) == line


def test_all_problems_are_told_at_once() -> None:
    assert refusal({"steps": "x", "rl": {"learning_rate": "y"}, "zzz": 1}).count(";") == 3


def test_a_toml_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("steps = 2\n[rl]\nlearning_rate = 0.5\n")
    assert load_toml(path) == {"steps": 2, "rl": {"learning_rate": 0.5}}


def test_a_toml_file_that_is_missing_damaged_or_a_folder_is_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.toml"
    damaged.write_text("steps = = 2")
    with pytest.raises(ConfigError, match=r"no such configuration file: .*absent\.toml"):
        load_toml(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot read .*damaged\.toml"):
        load_toml(damaged)
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(tmp_path)


def test_override_sets_leaves_at_any_depth_and_leaves_the_original_alone() -> None:
    values = {"a": {"b": {"c": 1, "d": 2}}, "e": [1]}
    assert override(values, {"a.b.c": 9, "x.y": 1, "e": 2}) == {"a": {"b": {"c": 9, "d": 2}}, "e": 2, "x": {"y": 1}}
    assert values == {"a": {"b": {"c": 1, "d": 2}}, "e": [1]}


def test_override_refuses_to_go_below_a_value() -> None:
    with pytest.raises(ConfigError, match=r"steps\.x: steps is a value, not a table"):
        override({"steps": 2}, {"steps.x": 1})


@given(st.dictionaries(st.sampled_from("abc"), st.integers()), st.sampled_from("abc"), st.integers())
def test_override_is_idempotent(values: dict[str, Any], key: str, value: int) -> None:
    once = override(values, {f"t.{key}": value})
    assert override(once, {f"t.{key}": value}) == once
    assert once["t"][key] == value


def test_nearest_hints_or_lists() -> None:
    assert nearest("stepz", ["steps", "rl"]) == "; did you mean 'steps'?"
    assert nearest("q", ["steps", "rl"]) == "; valid: rl, steps"
