"""The training loop: sample -> score -> advantages -> batch -> step -> publish weights.

Generation and learning overlap: rollout workers play and score groups all the while, the learner steps in its
own process. Invariants: a group is trained at most once and never staler than `max_lag`; a component's death
ends the run at once and by name; stopping leaves a checkpoint from which the run goes on.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from palaestra.agents import Engine
from palaestra.errors import WorkerError
from palaestra.trainer.advantages import estimate_advantages
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.buffer import Dropped, NumberedGroup, ReplayBuffer
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.learner import Learner, StepReport
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.metrics import StepRecord, StepTimes, summarise_step
from palaestra.trainer.rollouts import RolloutWorkers
from palaestra.trainer.sync import WeightSync
from palaestra.types import Group, Outcome

OnStep = Callable[[StepRecord], None]

_NUM_CANARIES = 2
_MIN_VALID = 2


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The running parts of a fit, each owned by whoever opened it."""

    config: GRPOConfig
    learner: Learner
    engine: Engine
    sync: WeightSync
    ledger: Ledger
    buffer: ReplayBuffer
    rollouts: RolloutWorkers
    checkpoints: Checkpoints


class Fit:
    """One run of the loop over its parts."""

    def __init__(self, parts: Parts, *, on_step: OnStep, clock: Callable[[], float] = time.monotonic) -> None:
        self._parts = parts
        self._on_step = on_step
        self._clock = clock
        self._dropped: list[Dropped] = []
        self._engine_busy_s = 0.0
        self._stopping = asyncio.Event()

    async def train(self) -> None:
        """Train until `config.steps`, or until `stop`; leaves a checkpoint of the last step."""
        parts = self._parts
        self._engine_busy_s = (await parts.engine.stats()).busy_s
        async with asyncio.TaskGroup() as tasks:
            rollouts = tasks.create_task(self._start_rollouts(), name="rollouts")
            while parts.learner.version < parts.config.steps:
                started_s = self._clock()
                groups = await self._sample()
                if groups is None:
                    break
                sampled_s = self._clock()
                rows = make_rows([group for _, group in groups], parts.config)
                report = await parts.learner.step(rows)
                learned_s = self._clock()
                canary = await self._publish(report, groups)
                times = StepTimes(
                    wait_s=sampled_s - started_s, learn_s=learned_s - sampled_s, sync_s=self._clock() - learned_s
                )
                await self._record(groups, report, times, canary)
            rollouts.cancel()
        await parts.checkpoints.save(parts.learner)

    def stop(self) -> None:
        """Finish the step under way, save, and leave."""
        self._stopping.set()

    async def _start_rollouts(self) -> None:
        parts = self._parts
        waiting = await parts.ledger.finished()
        for number, group in waiting:
            await parts.buffer.put(number, group)
        await parts.rollouts.run(await parts.ledger.unplayed(), num_waiting=len(waiting))

    async def _sample(self) -> Sequence[NumberedGroup] | None:
        parts = self._parts
        try:
            async with asyncio.timeout(parts.config.step_timeout_s), asyncio.TaskGroup() as tasks:
                taking = tasks.create_task(
                    parts.buffer.take(parts.config.groups_per_step, parts.learner.version, on_drop=self._replace)
                )
                stopping = tasks.create_task(self._stopping.wait())
                await asyncio.wait((taking, stopping), return_when=asyncio.FIRST_COMPLETED)
                taking.cancel()
                stopping.cancel()
            return None if taking.cancelled() or self._stopping.is_set() else taking.result()
        except TimeoutError as error:
            raise WorkerError(
                f"no batch within {parts.config.step_timeout_s:g} s: the learner waits for rollouts; "
                f"{len(parts.buffer)} of {parts.config.groups_per_step} groups are ready and "
                f"{parts.rollouts.num_generating} episodes are running; groups dropped meanwhile: {len(self._dropped)}"
            ) from error

    async def _replace(self, drop: Dropped) -> None:
        self._dropped.append(drop)
        await self._parts.ledger.drop(drop.number, drop.reason)
        await self._parts.rollouts.release(1)

    async def _publish(self, report: StepReport, groups: Sequence[NumberedGroup]) -> float | None:
        trajectories = (e.trajectory for _, group in groups for e in group.episodes)
        sequences = [t.ids.tolist() for t in trajectories if t is not None and len(t) > 1]
        self._parts.sync.set_canary(sequences[:_NUM_CANARIES])
        return await self._parts.sync.publish(report.version)

    async def _record(
        self, groups: Sequence[NumberedGroup], report: StepReport, times: StepTimes, canary: float | None
    ) -> None:
        parts = self._parts
        busy_s = (await parts.engine.stats()).busy_s
        record = summarise_step(
            [group for _, group in groups],
            report=report,
            times=times,
            dropped=[drop.reason for drop in self._dropped],
            canary=canary,
            engine_busy_s=busy_s,
            engine_busy_before_s=self._engine_busy_s,
            rollouts=parts.rollouts,
            concurrency=parts.config.concurrency,
        )
        self._engine_busy_s = busy_s
        self._dropped.clear()
        await parts.ledger.train([number for number, _ in groups], report.version, record.to_json())
        await parts.rollouts.release(len(groups))
        if report.version % parts.config.save_every == 0:
            await parts.checkpoints.save(parts.learner)
        self._on_step(record)


def is_trainable(outcome: Outcome, config: GRPOConfig) -> bool:
    """Whether an episode of this outcome may get an advantage and vote in its group's baseline."""
    return outcome is Outcome.SCORED or (config.train_on_truncated and outcome is Outcome.TRUNCATED)


def objection_to(group: Group, config: GRPOConfig) -> str | None:
    """Why a group cannot teach anything: too few valid members for a baseline, or (if configured) no variance."""
    rewards = [e.reward for e in group.episodes if is_trainable(e.outcome, config)]
    if len(rewards) < _MIN_VALID:
        return "invalid"
    if config.drop_zero_variance and len(set(rewards)) == 1:
        return "zero_variance"
    return None


def make_rows(groups: Sequence[Group], config: GRPOConfig) -> list[TrainRow]:
    """Trajectories with their group-relative advantages; only valid siblings vote, invalid ones are left out."""
    rows: list[TrainRow] = []
    for group in groups:
        is_valid_G = np.array([is_trainable(e.outcome, config) and e.trajectory is not None for e in group.episodes])
        rewards_G = np.array([e.reward if e.reward is not None else math.nan for e in group.episodes])
        advantages_G = estimate_advantages(config.advantage, rewards_G, is_valid_G)
        for episode, advantage, is_valid in zip(group.episodes, advantages_G, is_valid_G, strict=True):
            if is_valid and episode.trajectory is not None and episode.trajectory.num_sampled:
                rows.append(TrainRow(trajectory=episode.trajectory, advantage=float(advantage)))
    return rows
