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
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from palaestra.agents import Engine
from palaestra.errors import StepRefusedError
from palaestra.trainer.buffer import Dropped, NumberedGroup, ReplayBuffer
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.learner import Learner, StepReport
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.metrics import StepRecord, StepTimes, summarise_step
from palaestra.trainer.rollouts import RolloutWorkers
from palaestra.trainer.rows import is_trainable, make_rows
from palaestra.trainer.stalls import Stalls
from palaestra.trainer.sync import WeightSync
from palaestra.types import Group

OnStep = Callable[[StepRecord], None]
ValueT = TypeVar("ValueT")

_NUM_CANARIES = 2


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The running parts of a fit, each owned by whoever opened it; so is the watch over `stalls`."""

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
        self._engine_busy_s = self._engine_offset_s = 0.0
        self._stopping = asyncio.Event()
        self._refused_at = -1

    async def train(self) -> None:
        """Train until `config.steps`, or until `stop`; leaves a checkpoint of the last step."""
        parts = self._parts
        await self._count_on()
        async with AsyncExitStack() as leaving, asyncio.TaskGroup() as tasks:
            generating = tasks.create_task(self._generate(), name="rollouts")
            try:
                await self._learn_on()
            finally:
                generating.cancel()
                # whatever ended the steps, the group waits on its way out, and an environment may take long to end
                closed = parts.stalls.wait("the loop waits for the episodes under way to be closed")
                await leaving.enter_async_context(closed)
        await self._save()

    def stop(self) -> None:
        """Finish the step under way, save, and leave."""
        self._stopping.set()

    async def _learn_on(self) -> None:
        """One step after another, while there is one to make."""
        parts = self._parts
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

    async def _count_on(self) -> None:
        """Counts go on where the ledger has them; drops that no step has told of are told by the next one."""
        parts = self._parts
        async with parts.stalls.wait("the loop waits for the ledger's counts"):
            balance, told = await parts.ledger.balance(), await parts.ledger.drops_told()
            last = await parts.ledger.last_metrics()
        parts.rollouts.count_on(num_generated=balance.episodes_ended, num_verified=balance.episodes_verified)
        untold = Counter(balance.dropped)
        untold.subtract(told)
        self._dropped = list(untold.elements())
        # the engine counts from its own start, the run from its first life on
        self._engine_busy_s = last.get("engine_busy_s", 0.0)
        self._engine_offset_s = self._engine_busy_s - await self._engine_count()

    async def _generate(self) -> None:
        parts = self._parts
        waiting = await parts.ledger.finished()
        for number, group in waiting:
            await parts.buffer.put(number, group)
        await parts.rollouts.run(await parts.ledger.open_groups(), num_waiting=len(waiting))

    async def _sample(self) -> Sequence[NumberedGroup] | None:
        """The next batch; None when the run is to stop."""
        parts = self._parts
        taking = parts.buffer.take(parts.config.groups_per_step, parts.learner.version, on_drop=self._replace)
        return await self._unless_stopped(taking, "the learner waits for rollouts")

    async def _unless_stopped(self, work: Coroutine[Any, Any, ValueT], text: str) -> ValueT | None:
        """What `work`, which waits for rollouts, gives; None once the run is to stop, which calls it off."""
        parts = self._parts
        async with (
            parts.stalls.wait(text, parts.config.step_timeout_s, facts=self._tell_drops),
            asyncio.TaskGroup() as tasks,
        ):
            working = tasks.create_task(work, name=text)
            stopping = tasks.create_task(self._stopping.wait(), name="stop")
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            working.cancel()
            stopping.cancel()
        return None if working.cancelled() or self._stopping.is_set() else working.result()

    def _tell_drops(self) -> list[str]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(self._dropped).most_common())
        return [f"{len(self._dropped)} groups were dropped since the last step" + (f" ({reasons})" if reasons else "")]

    async def _replace(self, drop: Dropped) -> None:
        await self._parts.ledger.drop(drop.number, drop.reason)
        self._dropped.append(drop.reason)
        await self._parts.rollouts.release(1)

    async def _learn(self, groups: Sequence[Group]) -> StepReport:
        parts = self._parts
        trajectories = (e.trajectory for group in groups for e in group.episodes)
        sequences = [t.ids.tolist() for t in trajectories if t is not None and len(t) > 1]
        async with parts.stalls.wait("the loop waits for the learner to score the canary before the step"):
            await parts.sync.prepare(sequences[:_NUM_CANARIES])
        async with parts.stalls.wait("the loop waits for the learner's step"):
            return await parts.learner.step(make_rows(groups, parts.config))

    async def _refuse(self, batch: Sequence[NumberedGroup], error: StepRefusedError) -> None:
        """Drop a batch that the learner would not train, for else it would come again at each start; one in a row."""
        version = self._parts.learner.version
        line = f"groups {', '.join(str(number) for number, _ in batch)} are dropped (refused): {error}"
        async with self._parts.stalls.wait("the loop waits for the ledger to drop the batch"):
            for number, _ in batch:
                await self._replace(Dropped(number, "refused"))
            await self._parts.ledger.note(line)
        self._parts.stalls.tell(line)
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
        is_last, canary = step >= parts.config.steps, None
        started_s = self._clock()
        if parts.config.mode == "one-step" and not is_last:
            await self._unless_stopped(parts.rollouts.drain(), "the learner waits for the batch being played")
        drained_s = self._clock()
        if is_last or not self._stopping.is_set():  # else nothing is sampled any more
            text = "the loop waits for the engine to take the weights"
            async with parts.stalls.wait(text, facts=parts.sync.describe):
                canary = await parts.sync.publish(step)
        wait_s, sync_s = made.wait_s + drained_s - started_s, self._clock() - drained_s
        record = await self._summarise(replace(made, wait_s=wait_s, sync_s=sync_s, canary=canary))
        self._engine_busy_s = record.engine_busy_s
        self._dropped.clear()
        async with parts.stalls.wait("the loop waits for the ledger to complete the step"):
            await parts.ledger.amend(step, record.to_json())
        await parts.rollouts.release(len(made.batch))
        if step % parts.config.save_every == 0:
            await self._save()
        self._on_step(record)

    async def _summarise(self, made: _Made) -> StepRecord:
        parts = self._parts
        engine_busy_s = await self._engine_count() + self._engine_offset_s
        return summarise_step(
            [group for _, group in made.batch],
            report=made.report,
            times=StepTimes(wait_s=made.wait_s, learn_s=made.learn_s, sync_s=made.sync_s),
            dropped=self._dropped,
            canary=made.canary,
            engine_busy_s=engine_busy_s,
            engine_busy_before_s=self._engine_busy_s,
            generated=parts.rollouts.num_generated,
            verified=parts.rollouts.num_verified,
            concurrency=parts.config.concurrency,
            is_trained=partial(is_trainable, config=parts.config),
        )

    async def _engine_count(self) -> float:
        """Seconds that the engine computed since its own start."""
        async with self._parts.stalls.wait("the loop waits for the engine's counts"):
            return (await self._parts.engine.stats()).busy_s

    async def _save(self) -> None:
        async with self._parts.stalls.wait("the loop waits for the learner to save"):
            await self._parts.ledger.balance()
            await self._parts.checkpoints.save(self._parts.learner)
