"""How fast a learner is: scratch steps on real trajectories, one micro-batch each, in a few sizes.

Invariant: no step moves the weights by more than rounding, so that the engine may be given them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from palaestra.errors import WorkerError
from palaestra.trainer._proc import available_mb, memory_mb
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.learner import LearnerConfig
from palaestra.trainer.sizing._load import LearnerProcess
from palaestra.trainer.sizing._measured import LearnerLevel
from palaestra.types import Trajectory

_STILL = 1e-30
_FACTORS = (0.25, 0.5, 1.0, 2.0)
_SAFE_SHARE = 0.8
_MOST_STEPS = 20
_NUM_ROUNDS = 2
_PROBE = ((1, 2),)


def scratch_config(config: LearnerConfig) -> LearnerConfig:
    """The learner's configuration with one update a step, all rows in one micro-batch, and no learning to speak of."""
    still = {"learning_rate": _STILL, "weight_decay": 0.0, "num_epochs": 1, "num_minibatches": 1}
    return config.model_copy(update={**still, "max_micro_batch_tokens": micro_batch_sizes(config)[-1]})


def micro_batch_sizes(config: LearnerConfig) -> list[int]:
    """Sizes worth a try, in tokens: a quarter of the present one to twice it."""
    return sorted({max(1, round(factor * config.max_micro_batch_tokens)) for factor in _FACTORS})


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpeed:
    """Seconds of an update beside its tokens, and per padded token by micro-batch; `notes` say what did not fit."""

    update_s: float
    levels: tuple[LearnerLevel, ...]
    notes: tuple[str, ...]

    def step_s(self, level: LearnerLevel) -> float:
        """Seconds of a step with one micro-batch of that size."""
        return self.update_s + level.tokens * level.token_s


@dataclass(frozen=True, slots=True)
class Timed:
    """Steps of one size: padded tokens and the median of their seconds."""

    tokens: int
    seconds: float


class LearnerBench:
    """Times steps on copies of one trajectory of about the mean length."""

    def __init__(self, learner: LearnerProcess, trajectories: Sequence[Trajectory], config: LearnerConfig) -> None:
        self._learner = learner
        self._row = _typical(trajectories)
        self._length = int(np.flatnonzero(self._row.loss_mask)[-1])
        self._sizes = micro_batch_sizes(config)
        self._base_mb = 0.0

    async def measure(self, seconds: float) -> LearnerSpeed:
        """Time every size in two rounds, at least once each; sizes from the first that memory cannot take are left out.

        Of the rounds the better counts: other work on the machine only ever slows.
        """
        await self.step(1)
        self._base_mb = memory_mb(self._learner.pid)
        timed: dict[int, Timed] = {}
        notes: list[str] = []
        for _ in range(_NUM_ROUNDS):
            for size in self._sizes:
                refused = await self._try(size, seconds / len(self._sizes) / _NUM_ROUNDS, timed)
                if refused is not None:
                    notes.append(refused)
                    self._sizes = [smaller for smaller in self._sizes if smaller < size]
                    break
        update_s, levels = split_fixed(list(timed.values()))
        return LearnerSpeed(update_s=update_s, levels=levels, notes=tuple(notes))

    async def _try(self, size: int, seconds: float, timed: dict[int, Timed]) -> str | None:
        """Time a size into `timed`; why not, where memory cannot take it."""
        if self._would_burst(size, timed):
            return f"micro-batches of {size} tokens were not tried: the machine's memory would not hold them"
        try:
            found = await self._time(size, seconds)
        except WorkerError as error:
            if not timed:
                raise
            await self._learner.score(_PROBE)  # a learner that died says so; one that ran out of memory goes on
            return f"micro-batches of {size} tokens do not fit: {str(error)[:120]}"
        before = timed.get(found.tokens, found)
        timed[found.tokens] = found if found.seconds < before.seconds else before
        return None

    async def step(self, num_rows: int) -> float:
        """One step on that many rows; its seconds, the way there and back included."""
        rows = [
            TrainRow(trajectory=self._row, advantage=1.0 if position % 2 == 0 else -1.0) for position in range(num_rows)
        ]
        started_s = time.monotonic()
        await self._learner.step(rows)
        return time.monotonic() - started_s

    def num_rows(self, size: int) -> int:
        """Rows that fit into a micro-batch of `size` tokens; one at least."""
        return max(1, size // self._length)

    async def _time(self, size: int, seconds: float) -> Timed:
        num_rows = self.num_rows(size)
        taken_s: list[float] = []
        ends_s = time.monotonic() + seconds
        while not taken_s or (time.monotonic() < ends_s and len(taken_s) < _MOST_STEPS):
            taken_s.append(await self.step(num_rows))
        # the first step of a size pays for its memory
        return Timed(num_rows * self._length, median(taken_s[1:] or taken_s))

    def _would_burst(self, size: int, timed: Mapping[int, Timed]) -> bool:
        if not timed or size <= max(timed):
            return False
        grown_mb = memory_mb(self._learner.pid, is_peak=True) - self._base_mb
        return grown_mb * (size / max(timed) - 1.0) > _SAFE_SHARE * available_mb()


def split_fixed(timed: Sequence[Timed]) -> tuple[float, tuple[LearnerLevel, ...]]:
    """What an update costs beside its tokens (the line through the two smallest sizes at no token), and per token."""
    ordered = sorted(timed, key=lambda each: each.tokens)
    first = ordered[0]
    fixed_s = 0.0
    if len(ordered) > 1:
        second = ordered[1]
        slope = (second.seconds - first.seconds) / (second.tokens - first.tokens)
        # noise can tilt the line either way: tokens are never free, and the rest never below nothing
        fixed_s = min(max(0.0, first.seconds - slope * first.tokens), 0.9 * first.seconds)
    levels = tuple(
        LearnerLevel(tokens=each.tokens, token_s=max(each.seconds - fixed_s, 0.1 * each.seconds) / each.tokens)
        for each in ordered
    )
    return fixed_s, levels


def _typical(trajectories: Sequence[Trajectory]) -> Trajectory:
    """The trajectory whose length is nearest to the mean, as if version 0 had sampled it."""
    mean = sum(len(trajectory) for trajectory in trajectories) / len(trajectories)
    chosen = min(trajectories, key=lambda trajectory: abs(len(trajectory) - mean))
    return replace(chosen, versions=np.where(chosen.loss_mask, 0, -1).astype(np.int32))
