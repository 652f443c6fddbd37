"""Generation alone: the training loop itself, with a learner that takes no time and leaves the weights as they are.

Invariant: workers, ledger and buffer are those of a training run; what is missing is the learner, and nothing else.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from benchmarks._lag.plan import Run
from benchmarks._lag.play import Marks, SharedEngine, keep
from numpy.typing import NDArray

from palaestra.agents import EnginePolicy
from palaestra.agents.renderers import open_renderer
from palaestra.resources import Resources
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.buffer import ReplayBuffer
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.fit import Fit, Parts
from palaestra.trainer.learner import Published, StepReport
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.rollouts import RolloutPlan, RolloutWorkers
from palaestra.trainer.rows import is_trainable, objection_to
from palaestra.trainer.sampler import TaskSampler
from palaestra.trainer.stalls import Stalls
from palaestra.trainer.sync import WeightSync

_NEVER_STALE = 1 << 30


class FreeLearner:
    """A learner that costs nothing and learns nothing."""

    def __init__(self) -> None:
        self.version = 0

    async def step(self, rows: Sequence[TrainRow]) -> StepReport:
        """Count the step."""
        self.version += 1
        return StepReport(metrics={}, version=self.version, seconds=0.0)

    async def publish(self, folder: Path) -> Published:
        """There is nothing new."""
        return Published(version=self.version, checksum="")

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Nobody asks."""
        return []

    async def save(self, folder: Path) -> None:
        """An empty checkpoint."""
        await asyncio.to_thread(folder.mkdir)

    async def load(self, folder: Path) -> None:
        """There is nothing to load."""

    async def export(self, folder: Path) -> None:
        """There is nothing to export."""

    async def aclose(self) -> None:
        """There is nothing to close."""


class NoSync(WeightSync):
    """Carries nothing."""

    def __init__(self) -> None:
        """Neither learner nor engine are needed."""

    async def prepare(self, sequences: Sequence[Sequence[int]]) -> None:
        """Nothing is compared."""

    async def publish(self, version: int) -> None:
        """Nothing is carried."""


async def play_alone(run: Run, start: Path, folder: Path, engine: SharedEngine, resources: Resources) -> None:
    """Play `run.updates` batches as `run` would with a learner that costs nothing, and keep the times."""
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    await engine.begin()
    ledger = await Ledger.open(folder, meta={})
    try:
        parts = await _parts(run, start, folder, engine, resources, ledger)
        marks = Marks()
        await marks.begin(0)
        async with parts.stalls.watching():
            await Fit(parts, on_step=marks.set).train()
        keep(folder, {"marks": marks.found, "steps": await ledger.steps()})
    finally:
        await ledger.aclose()


async def _parts(
    run: Run, start: Path, folder: Path, engine: SharedEngine, resources: Resources, ledger: Ledger
) -> Parts:
    config, suite = run.config(), run.suite().split("train")
    await ledger.use_config(config.model_dump(mode="json"))
    plan = RolloutPlan(
        group_size=config.group_size,
        max_groups_in_hand=run.setting.num_batches * config.groups_per_step,
        concurrency=config.concurrency,
        seed=config.seed,
        max_failure_rate=config.max_failure_rate,
        max_invalid_rate=config.max_invalid_rate,
        group_timeout_s=config.group_timeout_s,
        is_valid=partial(is_trainable, config=config),
    )
    buffer = ReplayBuffer(max_lag=_NEVER_STALE, objection=partial(objection_to, config=config))
    policy = EnginePolicy(engine, open_renderer(start), config.sampling)
    sampler = TaskSampler(suite, seed=config.seed)
    rollouts = RolloutWorkers(suite, policy, sampler, ledger, resources, plan, on_group=buffer.put)
    quiet = Stalls(folder=folder / "logs", report_s=config.stall_report_s, processes=(), say=print)
    return Parts(
        # without a learner `one-step` is one batch after another, which is what `num_batches` says already
        config=config.model_copy(update={"mode": "async"}),
        learner=FreeLearner(),
        engine=engine,
        sync=NoSync(),
        ledger=ledger,
        buffer=buffer,
        rollouts=rollouts,
        checkpoints=Checkpoints(folder / "checkpoints", kept=1),
        stalls=quiet,
    )
