"""Weight sync: every version arrives, disagreement stops the run, nothing stays behind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from palaestra.errors import WorkerError
from palaestra.trainer.sync import WeightSync
from tests.toys import ToyEngine, ToyLearner


def make_engine() -> ToyEngine:
    return ToyEngine(lambda prompt, seed: [1])


async def test_canary_measures_the_largest_difference() -> None:
    engine, learner = make_engine(), ToyLearner()
    engine.wrong_by = 0.01
    with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        assert await sync.publish(0) == pytest.approx(0.01, abs=1e-6), "the first weights are checked too"
        await sync.prepare([[1, 2, 3]])
        learner.version = 1
        assert await sync.publish(1) == pytest.approx(0.01, abs=1e-6)


async def test_disagreement_stops_with_the_numbers() -> None:
    engine, learner = make_engine(), ToyLearner()
    engine.wrong_by = 0.3
    with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        await sync.prepare([[1, 2, 3]])
        with pytest.raises(WorkerError, match=r"version 0 engine and learner disagree by 0\.3 nats"):
            await sync.publish(0)


class StaleEngine(ToyEngine):
    """Says that it loaded, and goes on with what it had; `-1 - version / 1000` is a token's log-probability."""

    is_stale = False

    async def load_weights(self, folder: Path, version: int, checksum: str | None = None) -> None:
        if not self.is_stale:
            await super().load_weights(folder, version, checksum)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return [np.full(len(ids) - 1, -1.0 - self.version / 1000, np.float32) for ids in sequences]


class MovingLearner(ToyLearner):
    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return [np.full(len(ids) - 1, -1.0 - self.version / 1000, np.float32) for ids in sequences]


@pytest.mark.parametrize("is_stale", [True, False])
async def test_an_engine_that_kept_the_old_weights_is_found_far_below_the_tolerance(is_stale: bool) -> None:
    engine, learner = StaleEngine(lambda prompt, seed: [1]), MovingLearner()
    with WeightSync(learner, engine, tolerance=0.05, canary_every=1) as sync:
        await sync.publish(0)
        engine.is_stale = is_stale
        await sync.prepare([[1, 2, 3]])
        learner.version = 1
        if is_stale:
            with pytest.raises(
                WorkerError, match=r"version 1 the engine still holds the weights of the version before"
            ):
                await sync.publish(1)
        else:
            assert await sync.publish(1) == 0.0


async def test_a_learner_at_another_version_is_not_published() -> None:
    sync = WeightSync(ToyLearner(), make_engine(), tolerance=0.1, canary_every=1)
    with sync, pytest.raises(WorkerError, match="published version 0, not 3"):
        await sync.publish(3)


async def test_nan_counts_as_disagreement() -> None:
    engine, learner = make_engine(), ToyLearner()
    engine.wrong_by = float("nan")
    with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        await sync.prepare([[1, 2]])
        with pytest.raises(WorkerError):
            await sync.publish(0)


async def test_folders_in_shared_memory_are_removed() -> None:
    with WeightSync(ToyLearner(), make_engine(), tolerance=0.1, canary_every=1) as sync:
        await sync.publish(0)
        folder = sync._folder
        assert folder is not None
        assert folder.is_dir()
    assert not Path(folder).exists()


def test_folders_of_killed_runs_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palaestra.trainer.sync._SHARED_MEMORY", tmp_path)
    dead, alive = tmp_path / "palaestra-weights-99999999-a", tmp_path / f"palaestra-weights-{os.getpid()}-b"
    for folder in (dead, alive):
        folder.mkdir()
    with WeightSync(ToyLearner(), make_engine(), tolerance=0.1, canary_every=1):
        assert not dead.exists()
        assert alive.exists()
