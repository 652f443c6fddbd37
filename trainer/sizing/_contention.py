"""Rollouts as in training: by themselves, beside a learner that steps, and through weight syncs, each in its own time.

Invariant: a weight sync falls into none of the seconds that the slowdowns are made of: the step has it besides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import median

from palaestra.errors import ConfigError
from palaestra.trainer.sizing._learner_speed import LearnerBench, LearnerSpeed
from palaestra.trainer.sizing._load import Player, Watch, Watched
from palaestra.trainer.sizing._measured import scatter_of

_NUM_ROUNDS = 2
_SHORT_STEP_SHARE = 0.25
"""Of a load's seconds: the steps beside it are of the largest size that makes several of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Rollouts alone and beside a learner, how much slower its steps were then, and a weight sync during rollouts.

    `scatter` is by how much the rounds of either load differed.
    """

    alone: Watched
    together: Watched
    learner_slowdown: float
    sync_s: float
    scatter: float

    @property
    def engine_slowdown(self) -> float:
        """How much slower the engine was beside the learner."""
        return max(1.0, self.alone.tokens_per_s / self.together.tokens_per_s)


Publish = Callable[[], Awaitable[float]]
"""Hands new weights to the engine, and tells the seconds of that."""


class RolloutBench:
    """Loads a running engine and learner as training does, with `slots` episodes under way."""

    def __init__(
        self,
        player: Player,
        watch: Watch,
        learner: LearnerBench,
        publish: Publish,
        *,
        slots: int,
    ) -> None:
        self._player = player
        self._watch = watch
        self._learner = learner
        self._publish = publish
        self._slots = slots

    async def measure(self, speed: LearnerSpeed, seconds: float, *, tokens_per_turn: float) -> Rollouts:
        """The better of two rounds alone and beside the learner, in turns; then the syncs.

        Raises `ConfigError` where the engine sampled less than a turn's tokens: that says nothing.
        """
        share_s = seconds / (2 * _NUM_ROUNDS + 1)
        is_short = (level for level in reversed(speed.levels) if speed.step_s(level) < _SHORT_STEP_SHARE * share_s)
        level = next(is_short, speed.levels[0])
        num_rows = self._learner.num_rows(level.tokens)
        alone: list[Watched] = []
        together: list[Watched] = []
        steps_s: list[list[float]] = []
        for _ in range(_NUM_ROUNDS):
            alone.append((await self._player.play(self._watch, slots=self._slots, seconds=share_s))[1])
            watched, taken_s = await self._play_beside(lambda: self._learner.step(num_rows), share_s)
            together.append(watched)
            steps_s.append(taken_s)
        fastest = [max(rounds, key=lambda watched: watched.tokens_per_s) for rounds in (alone, together)]
        if min(watched.tokens for watched in fastest) < max(1.0, tokens_per_turn):
            raise ConfigError(f"no turn of a rollout was sampled in {share_s:.1f} s: give more time with --seconds")
        _, syncs_s = await self._play_beside(self._publish, share_s)
        return Rollouts(
            alone=fastest[0],
            together=fastest[1],
            learner_slowdown=max(1.0, min(map(median, steps_s)) / speed.step_s(level)),
            sync_s=median(syncs_s),
            scatter=max(scatter_of([each.tokens_per_s for each in rounds]) for rounds in (alone, together)),
        )

    async def _play_beside(self, work: Callable[[], Awaitable[float]], seconds: float) -> tuple[Watched, list[float]]:
        """Rollouts while `work` is done over and over: what was watched, and what it told each time, once at least."""
        taken_s: list[float] = []
        over = asyncio.Event()

        async def keep_working() -> None:
            while not (over.is_set() and taken_s):  # not cancelled: the learner would go on with its step all the same
                taken_s.append(await work())

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep_working())
            _, watched = await self._player.play(self._watch, slots=self._slots, seconds=seconds)
            over.set()
        return watched, taken_s
