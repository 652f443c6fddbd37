"""Weight sync: every version arrives, disagreement stops the run, nothing stays behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from palaestra.agents.engines import EngineConfig
from palaestra.agents.engines.transformers import TransformersEngine
from palaestra.errors import WorkerError
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.learner import LearnerConfig, LocalLearner, Published
from palaestra.trainer.sync import WeightSync
from palaestra.trainer.tiny import TinyModelConfig, make_model, make_tokenizer
from palaestra.types import Trajectory
from tests.toys import ToyEngine, ToyLearner


def make_engine() -> ToyEngine:
    return ToyEngine(lambda prompt, seed: [1])


async def test_canary_measures_the_largest_difference() -> None:
    engine, learner = make_engine(), ToyLearner()
    engine.wrong_by = 0.01
    async with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        assert await sync.publish(0) == pytest.approx(0.01, abs=1e-6), "the first weights are checked too"
        await sync.prepare([[1, 2, 3]])
        learner.version = 1
        assert await sync.publish(1) == pytest.approx(0.01, abs=1e-6)


async def test_disagreement_stops_with_the_numbers() -> None:
    engine, learner = make_engine(), ToyLearner()
    engine.wrong_by = 0.3
    async with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
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
    async with WeightSync(learner, engine, tolerance=0.05, canary_every=1) as sync:
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


async def test_what_a_stale_engine_is_behind_already_does_not_hide_the_next_step() -> None:
    engine, learner = StaleEngine(lambda prompt, seed: [1]), MovingLearner()
    async with WeightSync(learner, engine, tolerance=0.05, canary_every=1) as sync:
        learner.version = 1
        engine.is_stale = True  # 0.002 nats from the learner's, and neither side is any finer
        await sync.publish(1)
        await sync.prepare([[1, 2, 3]])
        learner.version = 6  # a step of 0.005 is not visible beside that
        await sync.publish(6)
        await sync.prepare([[1, 2, 3]])
        learner.version = 15
        with pytest.raises(WorkerError, match="version 15 the engine still holds the weights of the version before"):
            await sync.publish(15)


async def test_what_the_sides_once_disagreed_by_is_forgotten() -> None:
    """One canary of bad luck must not blind the check for more than the step after it."""
    engine, learner = StaleEngine(lambda prompt, seed: [1]), MovingLearner()
    async with WeightSync(learner, engine, tolerance=0.05, canary_every=1) as sync:
        engine.is_stale = True
        learner.version = 30  # 0.031 nats from the engine's
        await sync.publish(30)
        engine.is_stale = False
        await sync.prepare([[1, 2, 3]])
        learner.version = 31
        await sync.publish(31)
        engine.is_stale = True
        await sync.prepare([[1, 2, 3]])
        learner.version = 32
        with pytest.raises(WorkerError, match="version 32 the engine still holds the weights of the version before"):
            await sync.publish(32)


LONG = [list(range(101)), list(range(101))]
"""Two hundred tokens to compare."""


class WritingLearner(ToyLearner):
    """Writes real weights, of which each step multiplies all by `1 + growth`, and moves each score by `move` nats.

    They begin at 1, a number of bfloat16, or spread from there by `spread`.
    """

    def __init__(self, *, growth: float, move: float, spread: float = 0.0) -> None:
        super().__init__()
        self.growth = growth
        self.move = move
        self.start = np.linspace(1.0, 1.0 + spread, 1600).reshape(40, 40)

    async def publish(self, folder: Path) -> Published:
        published = await super().publish(folder)
        weights = self.start * (1 + self.growth) ** self.version
        save_file({"w": weights.astype(np.float32)}, folder / "model.safetensors")
        return Published(version=published.version, checksum=str(published.version))

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return [scores_at(len(ids) - 1, self.version * self.move) for ids in sequences]


class CoarseEngine(StaleEngine):
    """Rounds its scores to sixteenths of a nat."""

    def __init__(self, *, move: float) -> None:
        super().__init__(lambda prompt, seed: [1])
        self.move = move

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        exact = [scores_at(len(ids) - 1, self.version * self.move) for ids in sequences]
        return [(np.round(scores * 16) / 16).astype(np.float32) for scores in exact]


def scores_at(count: int, moved: float) -> NDArray[np.float32]:
    return (-1.0 - np.arange(count) / count - moved).astype(np.float32)


async def make_steps(sync: WeightSync, learner: ToyLearner, count: int) -> None:
    for _ in range(count):
        await sync.prepare(LONG)
        learner.version += 1
        await sync.publish(learner.version)


async def test_an_engine_whose_scores_never_move_is_found_below_its_own_rounding() -> None:
    engine, learner = CoarseEngine(move=1e-3), WritingLearner(growth=0.01, move=1e-3)
    async with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        await sync.publish(0)
        await make_steps(sync, learner, 20)
        engine.is_stale = True
        with pytest.raises(WorkerError, match=r"equal to the last bit, where about 2\d of them should have moved"):
            await make_steps(sync, learner, 10)  # three scores a step would have moved
    assert learner.version in range(26, 30)


@pytest.mark.parametrize(
    ("growth", "move"),
    [
        (1e-6, 1e-3),  # the learner is finer: what the engine holds is equal for the first thousands of steps
        (0.01, 0.0),  # the weights that moved are none that the canary shows
    ],
)
async def test_steps_that_an_engine_cannot_show_are_no_fault(growth: float, move: float) -> None:
    engine, learner = CoarseEngine(move=0.0), WritingLearner(growth=growth, move=move)
    async with WeightSync(learner, engine, tolerance=0.2, canary_every=1) as sync:
        await sync.publish(0)
        await make_steps(sync, learner, 60)
    assert engine.version == 60


async def test_a_folder_that_somebody_cleared_between_two_steps_is_no_evidence_and_no_fault() -> None:
    engine, learner = CoarseEngine(move=1e-3), WritingLearner(growth=0.01, move=1e-3)
    async with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        await sync.publish(0)
        engine.is_stale = True
        for _ in range(15):  # seven suffice where the folder is there
            for slot in sync._folder.iterdir() if sync._folder is not None else ():
                shutil.rmtree(slot)
            await make_steps(sync, learner, 1)


async def test_weights_are_not_read_before_the_scores_say_that_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("palaestra.trainer.sync.find_changes", read)
    engine, learner = CoarseEngine(move=1e-3), WritingLearner(growth=0.01, move=1e-3)
    async with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        await sync.publish(0)
        engine.is_stale = True
        await make_steps(sync, learner, 5)
        with pytest.raises(AssertionError, match="read"):
            await make_steps(sync, learner, 5)


WALK = np.random.default_rng(7).normal(size=(500, 200)).cumsum(axis=0) * 0.003
"""Where the log-probabilities are at each version: every step goes 0.0024 nats another way."""


class WalkingLearner(WritingLearner):
    def __init__(self, *, growth: float = 1e-4, spread: float = 1.0) -> None:
        super().__init__(growth=growth, move=0.0, spread=spread)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return [walk_of(self.version, ids, index) for index, ids in enumerate(sequences)]


class NoisyEngine(StaleEngine):
    """Off by another 0.012 nats each time, as a GPU's scores depend on what else it computes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(lambda prompt, seed: [1])
        self.rng = np.random.default_rng(seed)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        exact = [walk_of(max(0, self.version), ids, index) for index, ids in enumerate(sequences)]
        return [(scores + self.rng.normal(size=scores.shape) * 0.015).astype(np.float32) for scores in exact]


def walk_of(version: int, ids: Sequence[int], index: int) -> NDArray[np.float32]:
    return (WALK[version, 100 * index : 100 * index + len(ids) - 1] - 1.0).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_loaded", [0, 100])
async def test_a_noisy_engine_that_kept_its_weights_is_found_though_each_step_is_below_its_noise(
    seed: int, num_loaded: int
) -> None:
    """Also where it never loaded any, so that what it is behind was there at the first canary."""
    engine, learner = NoisyEngine(seed), WalkingLearner()
    async with WeightSync(learner, engine, tolerance=0.05, canary_every=1) as sync:
        learner.version = 5
        engine.is_stale = num_loaded == 0
        await sync.publish(5)
        await make_steps(sync, learner, num_loaded)
        engine.is_stale = True
        with pytest.raises(WorkerError, match="the engine does not follow the learner"):
            await make_steps(sync, learner, 64)


async def test_a_noisy_engine_that_loads_passes() -> None:
    engine, learner = NoisyEngine(), WalkingLearner()
    async with WeightSync(learner, engine, tolerance=0.05, canary_every=1) as sync:
        await sync.publish(0)
        await make_steps(sync, learner, 400)


async def test_a_noisy_engine_whose_rounding_swallows_the_steps_passes() -> None:
    """As a model's that was published in bfloat16: its weights stay where they are, and the learner's move."""
    engine, learner = NoisyEngine(), WalkingLearner(growth=1e-7, spread=0.0)
    async with WeightSync(learner, engine, tolerance=0.05, canary_every=1) as sync:
        await sync.publish(0)
        engine.is_stale = True
        await make_steps(sync, learner, 150)


class StaleTransformersEngine(TransformersEngine):
    is_stale = False

    async def load_weights(self, folder: Path, version: int, checksum: str | None = None) -> None:
        if not self.is_stale:
            await super().load_weights(folder, version, checksum)


def make_row(seed: int) -> TrainRow:
    rng, length = np.random.default_rng(seed), 60
    mask = np.arange(length) > 0
    trajectory = Trajectory(
        ids=rng.integers(0, 300, length).astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -5.7, 0.0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        turns=np.where(mask, 0, -1).astype(np.int16),
    )
    return TrainRow(trajectory=trajectory, advantage=float(rng.normal()))


@pytest.mark.slow
async def test_in_bfloat16_an_engine_that_kept_its_weights_is_found_and_one_that_did_not_is_not(tmp_path: Path) -> None:
    """Each step moves the log-probabilities by less than engine and learner disagree on equal weights."""
    make_tokenizer(["say user assistant one two three"] * 3, tmp_path, vocab_size=400)
    size = TinyModelConfig(start="random", hidden_size=64, num_layers=2, num_heads=2, ffn_size=64, max_positions=256)
    model = make_model(tmp_path, size)
    engine_config = EngineConfig(dtype="bfloat16", device="cpu", max_model_len=128)
    config = LearnerConfig(learning_rate=1e-5, device="cpu", precision="bfloat16")
    log = tmp_path / "engine.log"
    async with (
        await StaleTransformersEngine.start(model, engine_config, log_path=log, version=-1) as engine,
        await LocalLearner.start(model, config, tmp_path / "learner.log") as learner,
    ):

        async def make_steps(sync: WeightSync, count: int) -> None:
            for _ in range(count):
                rows = [make_row(10 * learner.version + k) for k in range(4)]
                await sync.prepare([row.trajectory.ids.tolist() for row in rows[:2]])
                await learner.step(rows)
                await sync.publish(learner.version)

        async with WeightSync(learner, engine, tolerance=0.05, canary_every=1) as sync:
            await sync.publish(0)
            await make_steps(sync, 20)
            engine.is_stale = True
            with pytest.raises(WorkerError, match="equal to the last bit"):
                await make_steps(sync, 20)


async def test_a_learner_at_another_version_is_not_published() -> None:
    sync = WeightSync(ToyLearner(), make_engine(), tolerance=0.1, canary_every=1)
    async with sync:
        with pytest.raises(WorkerError, match="published version 0, not 3"):
            await sync.publish(3)


async def test_nan_counts_as_disagreement() -> None:
    engine, learner = make_engine(), ToyLearner()
    engine.wrong_by = float("nan")
    async with WeightSync(learner, engine, tolerance=0.1, canary_every=1) as sync:
        await sync.prepare([[1, 2]])
        with pytest.raises(WorkerError):
            await sync.publish(0)


async def test_folders_in_shared_memory_are_removed() -> None:
    async with WeightSync(ToyLearner(), make_engine(), tolerance=0.1, canary_every=1) as sync:
        await sync.publish(0)
        folder = sync._folder
        assert folder is not None
        assert folder.is_dir()
    assert not Path(folder).exists()


async def test_a_folder_that_somebody_removed_ends_nothing() -> None:
    async with WeightSync(ToyLearner(), make_engine(), tolerance=0.1, canary_every=1) as sync:
        assert sync._folder is not None
        sync._folder.rmdir()
    assert sync._folder is None


async def test_folders_of_killed_runs_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palaestra.trainer.sync._SHARED_MEMORY", tmp_path)
    dead, alive = tmp_path / "palaestra-weights-99999999-a", tmp_path / f"palaestra-weights-{os.getpid()}-b"
    for folder in (dead, alive):
        folder.mkdir()
    async with WeightSync(ToyLearner(), make_engine(), tolerance=0.1, canary_every=1):
        assert not dead.exists()
        assert alive.exists()
