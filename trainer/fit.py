"""The training loop: sample -> score -> advantages -> batch -> step -> record -> publish weights.

Generation and learning overlap: rollout workers play and score groups all the while, the learner steps in its
own process. Invariants: a group is trained at most once and never staler than `max_lag`; a step is in the ledger
before its weights leave the learner; a component's death ends the run at once and by name; a stopped or killed run goes
on where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from palaestra.agents import Engine
from palaestra.errors import StepRefusedError
from palaestra.trainer.buffer import Dropped, NumberedGroup, ReplayBuffer
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.learner import Learner, StepReport
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.metrics import StepRecord, StepTimes, summarise_step
from palaestra.trainer.rollouts import RolloutWorkers
from palaestra.trainer.rows import make_rows
from palaestra.trainer.stalls import Stalls
from palaestra.trainer.sync import WeightSync
from palaestra.types import Group

OnStep = Callable[[StepRecord], None]

_NUM_CANARIES = 2


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
    stalls: Stalls


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """A step that was made, with the seconds it took so far."""

    batch: Sequence[NumberedGroup]
    report: StepReport
    wait_s: float
    learn_s: float
    sync_s: float = 0.0
    canary: float | None = None


class Fit:
    """One run of the loop over its parts."""

    def __init__(self, parts: Parts, *, on_step: OnStep, clock: Callable[[], float] = time.monotonic) -> None:
        self._parts = parts
        self._on_step = on_step
        self._clock = clock
        self._dropped: list[str] = []
        self._engine_busy_s = 0.0
        self._stopping = asyncio.Event()
        self._refused_at = -1

    async def train(self) -> None:
        """Train until `config.steps`, or until `stop`; leaves a checkpoint of the last step."""
        parts = self._parts
        self._engine_busy_s = (await parts.engine.stats()).busy_s
        await self._count_on()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._generate(), name="rollouts"),
                tasks.create_task(parts.stalls.watch(), name="stall watch"),
            ]
            while parts.learner.version < parts.config.steps:
                started_s = self._clock()
                batch = await self._sample()
                if batch is None:
                    break
                waited_s = self._clock() - started_s
                try:
                    report = await self._learn([group for _, group in batch])
                except StepRefusedError as error:
                    await self._refuse(batch, error)
                    continue
                made = _Made(batch=batch, report=report, wait_s=waited_s, learn_s=self._clock() - started_s - waited_s)
                await self._record(made)
                await self._publish(made)
            for task in background:
                task.cancel()
        await self._save()

    def stop(self) -> None:
        """Finish the step under way, save, and leave."""
        self._stopping.set()

    async def _count_on(self) -> None:
        """Counts go on where the ledger has them; drops that no step has told of are told by the next one."""
        ledger = self._parts.ledger
        balance = await ledger.balance()
        self._parts.rollouts.count_on(num_generated=balance.episodes_ended, num_verified=balance.episodes_verified)
        untold = Counter(balance.dropped)
        for record in await ledger.steps():
            untold.subtract(record.get("dropped", {}))
        self._dropped = list(untold.elements())

    async def _generate(self) -> None:
        parts = self._parts
        waiting = await parts.ledger.finished()
        for number, group in waiting:
            await parts.buffer.put(number, group)
        await parts.rollouts.run(await parts.ledger.open_groups(), num_waiting=len(waiting))

    async def _sample(self) -> Sequence[NumberedGroup] | None:
        """The next batch; None when the run is to stop."""
        parts = self._parts
        async with (
            parts.stalls.wait("the learner waits for rollouts", parts.config.step_timeout_s),
            asyncio.TaskGroup() as tasks,
        ):
            taking = tasks.create_task(
                parts.buffer.take(parts.config.groups_per_step, parts.learner.version, on_drop=self._replace),
                name="batch",
            )
            stopping = tasks.create_task(self._stopping.wait(), name="stop")
            await asyncio.wait((taking, stopping), return_when=asyncio.FIRST_COMPLETED)
            taking.cancel()
            stopping.cancel()
        return None if taking.cancelled() or self._stopping.is_set() else taking.result()

    async def _replace(self, drop: Dropped) -> None:
        self._dropped.append(drop.reason)
        await self._parts.ledger.drop(drop.number, drop.reason)
        await self._parts.rollouts.release(1)

    async def _learn(self, groups: Sequence[Group]) -> StepReport:
        parts = self._parts
        trajectories = (e.trajectory for group in groups for e in group.episodes)
        sequences = [t.ids.tolist() for t in trajectories if t is not None and len(t) > 1]
        async with parts.stalls.wait("the loop waits for the learner's step"):
            await parts.sync.prepare(sequences[:_NUM_CANARIES])
            return await parts.learner.step(make_rows(groups, parts.config))

    async def _refuse(self, batch: Sequence[NumberedGroup], error: StepRefusedError) -> None:
        """Drop a batch that the learner would not train, for else it would come again at each start; one in a row."""
        version = self._parts.learner.version
        line = f"groups {', '.join(str(number) for number, _ in batch)} are dropped (refused): {error}"
        await self._parts.ledger.note(line)
        self._parts.stalls.say(line)
        for number, _ in batch:
            await self._replace(Dropped(number, "refused"))
        if self._refused_at == version:
            raise error
        self._refused_at = version

    async def _record(self, made: _Made) -> None:
        """Write the step down: from here on it is part of the run, whatever happens."""
        record = await self._summarise(made)
        trace = made.report.trace.to_bytes() if made.report.trace is not None else None
        numbers = [number for number, _ in made.batch]
        async with self._parts.stalls.wait("the loop waits for the ledger to take the step"):
            await self._parts.ledger.train(numbers, record.step, record.to_json(), trace)

    async def _publish(self, made: _Made) -> None:
        """Hand the new weights to the engine, let it play on, and save where that is due."""
        parts, step = self._parts, made.report.version
        started_s = self._clock()
        if parts.config.mode == "one-step" and step < parts.config.steps:
            async with parts.stalls.wait("the learner waits for the batch being played", parts.config.step_timeout_s):
                await parts.rollouts.drain()
        drained_s = self._clock()
        async with parts.stalls.wait("the loop waits for the engine to take the weights"):
            canary = await parts.sync.publish(step)
        wait_s, sync_s = made.wait_s + drained_s - started_s, self._clock() - drained_s
        record = await self._summarise(replace(made, wait_s=wait_s, sync_s=sync_s, canary=canary))
        self._engine_busy_s = record.engine_busy_s
        self._dropped.clear()
        await parts.ledger.amend(step, record.to_json())
        await parts.rollouts.release(len(made.batch))
        if step % parts.config.save_every == 0:
            await self._save()
        self._on_step(record)

    async def _summarise(self, made: _Made) -> StepRecord:
        parts = self._parts
        async with parts.stalls.wait("the loop waits for the engine's counts"):
            stats = await parts.engine.stats()
        return summarise_step(
            [group for _, group in made.batch],
            report=made.report,
            times=StepTimes(wait_s=made.wait_s, learn_s=made.learn_s, sync_s=made.sync_s),
            dropped=self._dropped,
            canary=made.canary,
            engine_busy_s=stats.busy_s,
            engine_busy_before_s=self._engine_busy_s,
            rollouts=parts.rollouts,
            concurrency=parts.config.concurrency,
        )

    async def _save(self) -> None:
        async with self._parts.stalls.wait("the loop waits for the learner to save"):
            await self._parts.ledger.balance()
            await self._parts.checkpoints.save(self._parts.learner)
