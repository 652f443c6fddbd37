"""The task sampler: which task group number n plays.

Invariant: a pure function of (suite, seed, number), so the number alone is the sampler's state.
"""

from __future__ import annotations

from palaestra.envs import EnvSuite
from palaestra.types import Task


class TaskSampler:
    """Endless stream of training tasks, drawn by the suite's weights."""

    def __init__(self, suite: EnvSuite, *, seed: int, next_number: int = 0) -> None:
        self._suite = suite
        self._seed = seed
        self.next_number = next_number

    def draw(self) -> tuple[int, Task]:
        """The next group number and its task."""
        number = self.next_number
        self.next_number += 1
        return number, self._suite.draw(number, seed=self._seed)
