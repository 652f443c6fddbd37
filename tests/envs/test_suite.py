"""Suites: what they draw is a function of (suite, split, seed, number), and mistakes are refused when made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import pytest

from palaestra.envs import DEFAULT_REWARD, Env, EnvSuite, _registry, register
from palaestra.errors import ConfigError
from palaestra.rewards import Success, Unsafe
from palaestra.types import JsonObject, Message, Observation, Split, Task


class Plain(Env):
    """Tasks without anything to do; `colour` is an option."""

    num_tasks: Mapping[Split, int] = {"train": 1000, "validation": 5, "test": 5}

    def __init__(self, *, colour: str = "red", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.colour = colour

    def make_task_data(self, split: Split, index: int) -> JsonObject:
        return {"number": index}

    async def begin(self, task: Task) -> Observation:
        return (Message("user", "hi"),)

    async def verify(self) -> Mapping[str, float]:
        return {"success": 1.0}


class One(Plain):
    env_id = "test/One-v0"


class Two(Plain):
    env_id = "test/Two-v0"


ENVS: dict[str, type[Plain]] = {"test/One-v0": One, "test/Two-v0": Two}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_registry, "_registrations", dict(_registry._registrations))
    for env_id, cls in ENVS.items():
        register(env_id, f"{cls.__module__}:{cls.__qualname__}", family="toy", summary="plain")
    monkeypatch.setattr("palaestra.envs._suite.load_class", lambda env_id: ENVS.get(env_id, dict))
    yield
    for env_id in ENVS:
        gymnasium.registry.pop(env_id, None)


def suite(**changes: Any) -> EnvSuite:
    return EnvSuite({"test/One-v0": 3.0, "test/Two-v0": 1.0}, **changes)


def test_a_draw_is_a_pure_function_of_its_arguments() -> None:
    drawn = [suite().draw(number, seed=1) for number in range(50)]
    assert drawn == [suite().draw(number, seed=1) for number in reversed(range(50))][::-1]
    assert drawn != [suite().draw(number, seed=2) for number in range(50)]
    assert all(task.split == "train" for task in drawn)


def test_weights_are_the_odds_of_an_environment() -> None:
    counts = Counter(suite().draw(number, seed=0).env_id for number in range(2000))
    assert 0.70 < counts["test/One-v0"] / 2000 < 0.80


def test_another_split_draws_other_tasks() -> None:
    held_out = suite().split("test")
    assert {held_out.draw(number, seed=0).split for number in range(20)} == {"test"}
    assert suite().active_split == "train"


def test_listed_tasks_are_even_over_the_environments() -> None:
    ids = [task.id for task in suite().split("test").tasks(5, start=1)]
    assert ids == [
        f"test/{name}-v0/test/{i}" for name, i in (("One", 1), ("Two", 1), ("One", 2), ("Two", 2), ("One", 3))
    ]


def test_asking_for_more_tasks_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="test/One-v0 has only 5 test tasks"):
        suite().split("test").tasks(11)


def test_form_and_options_reach_the_environment() -> None:
    made = suite(form="compact", options={"test/One-v0": {"colour": "blue"}}).make("test/One-v0")
    assert isinstance(made, One)
    assert (made.form, made.colour, made.split) == ("compact", "blue", "train")


def test_a_suite_describes_itself_as_json() -> None:
    stack = (Success() * 2.0 - Unsafe()).when(Success() > 0)
    success = {"term": "success", "class": "palaestra.rewards._terms.Success", "parameters": {}}
    unsafe = {"term": "unsafe", "class": "palaestra.rewards._terms.Unsafe", "parameters": {}}
    given = suite(form="compact", options={"test/One-v0": {"colour": "blue"}}, reward={"test/One-v0": stack})
    assert json.loads(json.dumps(given.describe())) == {
        "weights": given.weights,
        "form": "compact",
        "options": {"test/One-v0": {"colour": "blue"}},
        "rewards": {
            "test/One-v0": [
                {**success, "weight": 2.0, "when": [{**success, "comparison": ">", "bound": 0}]},
                {**unsafe, "weight": -1.0, "when": [{**success, "comparison": ">", "bound": 0}]},
            ]
        },
    }


def test_a_suite_brings_its_own_reward() -> None:
    stack = Success() * 3.0
    assert suite(reward=stack).make("test/One-v0").reward is stack
    made = suite(reward={"test/One-v0": stack})
    assert (made.make("test/One-v0").reward, made.make("test/Two-v0").reward) == (stack, DEFAULT_REWARD)


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ({}, {}, "at least one environment"),
        ({"test/Oen-v0": 1.0}, {}, "unknown environment 'test/Oen-v0'; did you mean 'test/One-v0'"),
        ({"test/One-v0": 0.0}, {}, "weight of test/One-v0 must be above 0, not 0.0"),
        ({"test/One-v0": float("nan")}, {}, "weight of test/One-v0 must be above 0, not nan"),
        ({"test/One-v0": "2"}, {}, "weight of test/One-v0 must be a number, not '2'"),
        ({"test/One-v0": 1.0}, {"test/Two-v0": {}}, "options for 'test/Two-v0', not in the suite"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused(
    weights: dict[str, float], options: dict[str, dict[str, Any]], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        EnvSuite(weights, options=options)
    assert words in str(caught.value)


def test_an_option_that_the_environment_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"options of test/One-v0: .*'color'"):
        suite(options={"test/One-v0": {"color": "blue"}}).make("test/One-v0")


def test_a_class_that_is_no_environment_of_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="palaestra/ToolDesk-v0 is not a Palaestra environment"):
        EnvSuite({"palaestra/ToolDesk-v0": 1.0}).make("palaestra/ToolDesk-v0")
