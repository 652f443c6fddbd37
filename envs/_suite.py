"""A suite: environments with weights, played together by one policy.

Invariant: what a suite draws is a pure function of (suite, split, seed, number), so that a run can be resumed
at any number and two runs with one seed see the same tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from palaestra.config import nearest
from palaestra.envs._base import Env
from palaestra.envs._registry import load_class, registration
from palaestra.errors import ConfigError
from palaestra.resources import Resources
from palaestra.rewards import RewardStack
from palaestra.types import Form, Split, Task


@dataclass(frozen=True)
class EnvSuite:
    """Environments by id with their weights; `options` are extra constructor arguments by id, as JSON values.

    `reward` replaces the environments' own stack, for all of them or by id.

    `EnvSuite({"palaestra/CodeRepair-v0": 2.0, "palaestra/MiniWoB-v0": 1.0})` draws the first twice as often.
    """

    weights: Mapping[str, float]
    form: Form = "full"
    active_split: Split = "train"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reward: RewardStack | Mapping[str, RewardStack] | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise ConfigError("a suite needs at least one environment")
        for env_id, weight in self.weights.items():
            registration(env_id)
            if not isinstance(weight, int | float):
                raise ConfigError(f"weight of {env_id} must be a number, not {weight!r}")
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"weight of {env_id} must be above 0, not {weight}")
        for env_id in self.options:
            if env_id not in self.weights:
                raise ConfigError(f"options for {env_id!r}, not in the suite{nearest(env_id, list(self.weights))}")

    @property
    def env_ids(self) -> tuple[str, ...]:
        """The ids in the order given."""
        return tuple(self.weights)

    def split(self, split: Split) -> EnvSuite:
        """The same suite on another split."""
        return replace(self, active_split=split)

    def make(self, env_id: str, *, resources: Resources | None = None) -> Env:
        """A new environment of the suite; raises `ConfigError` when its class or its options are wrong."""
        cls = load_class(env_id)
        if not issubclass(cls, Env):
            raise ConfigError(f"{env_id} is not a Palaestra environment; wrap it first")
        kwargs = dict(self.options.get(env_id, {}))
        reward = self.reward.get(env_id) if isinstance(self.reward, Mapping) else self.reward
        if reward is not None:
            kwargs["reward"] = reward
        try:
            return cls(form=self.form, split=self.active_split, resources=resources, **kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"options of {env_id}: {' '.join(str(error).split())}") from error

    def draw(self, number: int, *, seed: int) -> Task:
        """Task `number` (from 0) of the endless random stream that `seed` starts."""
        split_number = ("train", "validation", "test").index(self.active_split)
        rng = np.random.default_rng([seed, split_number, number])
        total = math.fsum(self.weights.values())
        env_id = self.env_ids[int(rng.choice(len(self.env_ids), p=[w / total for w in self.weights.values()]))]
        env = self.make(env_id)
        return env.make_task(self.active_split, int(rng.integers(env.num_tasks[self.active_split])))

    def tasks(self, count: int, *, start: int = 0) -> list[Task]:
        """`count` tasks, as even over the environments as can be, each environment's from index `start` on.

        Raises `ConfigError` when a split has too few tasks.
        """
        envs = [self.make(env_id) for env_id in self.env_ids]
        chosen = []
        for position in range(count):
            env = envs[position % len(envs)]
            index = start + position // len(envs)
            if index >= env.num_tasks[self.active_split]:
                raise ConfigError(f"{env.env_id} has only {env.num_tasks[self.active_split]} {self.active_split} tasks")
            chosen.append(env.make_task(self.active_split, index))
        return chosen

    def describe(self) -> dict[str, Any]:
        """The suite as JSON, to be kept with a run."""
        options = {env_id: dict(kwargs) for env_id, kwargs in self.options.items()}
        stacks = self.reward if isinstance(self.reward, Mapping) else {"": self.reward}
        rewards = {env_id: stack.describe() for env_id, stack in stacks.items() if stack is not None}
        return {"weights": dict(self.weights), "form": self.form, "options": options, "rewards": rewards}
