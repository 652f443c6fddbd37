"""Who waits for whom around a step: not the learner for the engine, but new weights for the old ones' scores."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from palaestra.errors import PolicyError
from palaestra.trainer.sync import WeightSync
from tests.toys import ToyEngine, ToyLearner


class QueueingEngine(ToyEngine):
    """Scores once it is let to, as behind a queue of requests."""

    def __init__(self) -> None:
        super().__init__(lambda prompt, seed: [1])
        self.is_free = asyncio.Event()
        self.is_free.set()
        self.log: list[str] = []
        self.fault: Exception | None = None

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        try:
            await self.is_free.wait()
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise
        if self.fault is not None:
            raise self.fault
        self.log.append(f"scored {self.version}")
        return await super().score(sequences)

    async def load_weights(self, folder: Path, version: int, checksum: str | None = None) -> None:
        self.log.append(f"load {version}")
        await super().load_weights(folder, version, checksum)


async def test_a_step_does_not_wait_for_the_engines_queue_and_no_weights_come_before_its_scores() -> None:
    engine, learner = QueueingEngine(), ToyLearner()
    async with asyncio.timeout(10), WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        await sync.publish(0)
        engine.log.clear()
        engine.is_free.clear()
        await sync.prepare([[1, 2, 3]])
        await learner.step([])
        publishing = asyncio.ensure_future(sync.publish(1))
        await asyncio.sleep(0)
        assert sync.describe() == ["the engine has not yet scored the canary with the weights before the step"]
        engine.is_free.set()
        assert await publishing == 0.0
        assert engine.log == ["scored 0", "load 1", "scored 1"]
        assert sync.describe() == []


async def test_a_score_that_failed_during_the_step_is_raised_before_the_weights_are_loaded() -> None:
    engine, learner = QueueingEngine(), ToyLearner()
    async with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        await sync.publish(0)
        engine.fault = PolicyError("no room")
        await sync.prepare([[1, 2, 3]])
        await learner.step([])
        with pytest.raises(PolicyError, match="no room"):
            await sync.publish(1)
    assert engine.loaded == [0]


async def test_a_score_that_no_step_came_of_is_called_off_by_the_next_and_on_leaving() -> None:
    engine, learner = QueueingEngine(), ToyLearner()
    others = asyncio.all_tasks()
    async with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        await sync.publish(0)
        engine.log.clear()
        engine.is_free.clear()
        await sync.prepare([[1, 2, 3]])
        await asyncio.sleep(0)
        await sync.prepare([[1, 2, 3]])
        assert engine.log == ["cancelled"]
        await asyncio.sleep(0)
    assert engine.log == ["cancelled", "cancelled"]
    assert asyncio.all_tasks() == others


async def leave_with_a_failed_score(error: Exception | None) -> None:
    engine, learner = QueueingEngine(), ToyLearner()
    async with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        await sync.publish(0)
        engine.fault = PolicyError("no room")
        await sync.prepare([[1, 2, 3]])
        await asyncio.sleep(0)
        if error is not None:
            raise error


async def test_a_score_that_failed_unseen_is_raised_on_leaving() -> None:
    with pytest.raises(PolicyError, match="no room"):
        await leave_with_a_failed_score(None)


async def test_a_score_that_failed_unseen_does_not_hide_why_the_run_ends() -> None:
    with pytest.raises(KeyError, match="why the run ends") as caught:
        await leave_with_a_failed_score(KeyError("why the run ends"))
    assert caught.value.__notes__ == ["the engine failed to score the canary, too: no room"]
