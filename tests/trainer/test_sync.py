"""Weight sync: every version arrives, disagreement stops the run, nothing stays behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
