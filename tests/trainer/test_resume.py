"""Going on: every recorded step is made again to the last bit, whatever became of the checkpoints."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from palaestra.errors import ConfigError, StepRefusedError, WorkerError
from palaestra.trainer._learner_worker import LearnerService
from palaestra.trainer._model_identity import identity_of
from palaestra.trainer._policy_model import PolicyModel
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.learner import LearnerConfig, Published, StepReport
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.resume import resume
from palaestra.trainer.rows import make_rows
from palaestra.trainer.tiny import TinyModelConfig, make_model, make_tokenizer
from palaestra.types import Episode, Group, Outcome, Trajectory
from tests.trainer.test_ledger import make_task

LEARNER = LearnerConfig(learning_rate=1e-2, device="cpu", num_minibatches=2)
FASTER = LEARNER.model_copy(update={"learning_rate": 3e-2})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(["say said stop ok wrong"] * 3, folder, vocab_size=400)
    return make_model(
        folder, TinyModelConfig(start="random", hidden_size=32, num_layers=2, num_heads=1, ffn_size=32), seed=0
    )


class NearLearner:
    """The learner's own code, in this process."""

    def __init__(self, model: Path, config: LearnerConfig = LEARNER) -> None:
        torch.set_num_threads(config.threads)
        self.service = LearnerService(PolicyModel(str(model), config), config)
        self.version = 0
        self.is_closed = False

    async def step(self, rows: Sequence[TrainRow]) -> StepReport:
        report = self.service.step(list(rows))
        self.version = report.version
        return report

    async def publish(self, folder: Path) -> Published:
        return self.service.publish(folder)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return self.service.score([list(sequence) for sequence in sequences])

    async def save(self, folder: Path) -> None:
        self.service.save(folder)

    async def load(self, folder: Path) -> None:
        self.version = self.service.load(folder)

    async def export(self, folder: Path) -> None:
        self.service.export(folder)

    async def aclose(self) -> None:
        self.is_closed = True

    async def watch(self) -> NoReturn:
        raise AssertionError("no process, no end")

    async def stacks(self) -> str:
        return "here"

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.service._state()["parameters"].items()}


def make_group(number: int) -> Group:
    rng = np.random.default_rng(number)
    task = make_task(number)
    episodes = []
    for position in range(3):
        length = int(rng.integers(5, 9))
        mask = np.arange(length) >= 3
        trajectory = Trajectory(
            ids=rng.integers(0, 300, length).astype(np.int32),
            loss_mask=mask,
            logprobs=np.where(mask, rng.normal(-5.0, 0.1, length), 0.0).astype(np.float32),
            versions=np.where(mask, number // 2, -1).astype(np.int32),
            turns=np.where(mask, 0, -1).astype(np.int16),
        )
        episodes.append(
            Episode(
                id=f"{number}.{position}",
                task=task,
                outcome=Outcome.SCORED,
                messages=(),
                turns=(),
                reward=float(rng.random()),
                terms=(),
                facts={"success": 0.0},
                trajectory=trajectory,
                failure=None,
                wall_s=0.1,
            )
        )
    return Group(id=str(number), task=task, episodes=tuple(episodes))


def config(learner: LearnerConfig = LEARNER) -> GRPOConfig:
    return GRPOConfig(steps=6, group_size=3, groups_per_step=2, learner=learner)


class History:
    """A run of some steps in a folder, with a checkpoint after each of `saved`."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.lines: list[str] = []
        self.opened: list[NearLearner] = []

    async def open(self) -> tuple[Ledger, Checkpoints]:
        ledger = await Ledger.open(self.folder, meta={"model": identity_of(str(self.model))})
        meta = await ledger.meta()
        return ledger, Checkpoints(self.folder / "checkpoints", run=meta["run"], kept=9)

    async def make(self, steps: range, *, saved: Sequence[int], learner: NearLearner, settings: LearnerConfig) -> None:
        ledger, checkpoints = await self.open()
        await ledger.use_config(config(settings).model_dump(mode="json"))
        for step in steps:
            numbers = [2 * step - 2, 2 * step - 1]
            groups = [make_group(number) for number in numbers]
            for number, group in zip(numbers, groups, strict=True):
                await ledger.issue(number, group.task, 3)
                for position, episode in enumerate(group.episodes):
                    await ledger.end(number, position, episode)
                await ledger.finish(number)
            report = await learner.step(make_rows(groups, config(settings)))
            assert report.trace is not None
            await ledger.train(numbers, step, {"step": step}, report.trace.to_bytes())
            if step in saved:
                await checkpoints.save(learner)
        await ledger.aclose()

    async def say(self, line: str) -> None:
        self.lines.append(line)

    async def open_learner(self, settings: LearnerConfig) -> NearLearner:
        assert all(learner.is_closed for learner in self.opened), "memory holds no second one"
        self.opened.append(NearLearner(self.model, settings))
        return self.opened[-1]

    async def resume(self, settings: LearnerConfig = LEARNER, *, save_every: int = 100) -> NearLearner:
        ledger, checkpoints = await self.open()
        try:
            learner = await resume(
                ledger, checkpoints, settings, save_every=save_every, open_learner=self.open_learner, say=self.say
            )
            assert (await ledger.balance()).trained == 2 * learner.version
        finally:
            await ledger.aclose()
        assert isinstance(learner, NearLearner)
        assert [each for each in self.opened if not each.is_closed] == [learner]
        return learner


async def make_history(folder: Path, model: Path, *, saved: Sequence[int] = (2, 4)) -> tuple[History, NearLearner]:
    history, learner = History(folder, model), NearLearner(model)
    await history.make(range(1, 7), saved=saved, learner=learner, settings=LEARNER)
    return history, learner


def assert_same(resumed: NearLearner, unbroken: NearLearner) -> None:
    assert resumed.version == unbroken.version
    before, after = unbroken.service._state(), resumed.service._state()
    assert torch.equal(before["rng"], after["rng"])
    for name, tensor in unbroken.weights().items():
        assert torch.equal(tensor, resumed.weights()[name]), name
    for key, moments in before["moments"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, after["moments"][key][name]), (key, name)


async def test_steps_after_the_checkpoint_are_made_again_to_the_last_bit(tmp_path: Path, model: Path) -> None:
    history, unbroken = await make_history(tmp_path, model)
    assert_same(await history.resume(), unbroken)
    assert history.lines == ["making steps 5 to 6 again from the ledger, on checkpoint version-00000004"]
    history.lines.clear()
    history.opened.clear()
    assert_same(await history.resume(), unbroken)
    assert history.lines == [], "they were saved then"


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "file"])
async def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, model: Path, damage: str) -> None:
    history, unbroken = await make_history(tmp_path, model)
    folder = tmp_path / "checkpoints" / "version-00000004"
    state = folder / "learner.pt"
    if damage == "flip":
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:-100])
    else:
        (folder / ("manifest.json" if damage == "manifest" else "learner.pt")).unlink()
    assert_same(await history.resume(), unbroken)
    assert history.lines[0].startswith("checkpoint version-00000004 cannot be used (")
    assert "making steps 3 to 6 again from the ledger, on checkpoint version-00000002" in history.lines[1]
    assert (tmp_path / "checkpoints" / "version-00000004.damaged-1").is_dir()


async def test_without_any_checkpoint_all_steps_are_made_again(tmp_path: Path, model: Path) -> None:
    history, unbroken = await make_history(tmp_path, model)
    shutil.rmtree(tmp_path / "checkpoints")
    assert_same(await history.resume(), unbroken)
    assert history.lines == ["making steps 1 to 6 again from the ledger, on the model the run began with"]


async def test_a_checkpoint_that_is_newer_than_the_ledger_is_not_used(tmp_path: Path, model: Path) -> None:
    history, _ = await make_history(tmp_path, model, saved=(2,))
    newer = tmp_path / "checkpoints" / "version-00000009"
    shutil.copytree(tmp_path / "checkpoints" / "version-00000002", newer)
    assert (await history.resume()).version == 6
    assert "it is of step 9, the ledger ends with 6" in history.lines[0]
    assert not newer.exists()


async def test_a_checkpoint_of_another_run_is_not_used(tmp_path: Path, model: Path) -> None:
    history, unbroken = await make_history(tmp_path / "a", model)
    await make_history(tmp_path / "b", model)
    mine, theirs = (tmp_path / name / "checkpoints" / "version-00000004" for name in ("a", "b"))
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    assert_same(await history.resume(), unbroken)
    assert "it belongs to another run" in history.lines[0]


async def test_steps_are_made_again_with_the_settings_that_made_them(tmp_path: Path, model: Path) -> None:
    history, unbroken = History(tmp_path, model), NearLearner(model)
    await history.make(range(1, 4), saved=(2,), learner=unbroken, settings=LEARNER)
    faster = NearLearner(model, FASTER)
    await unbroken.save(tmp_path / "hand-over")
    await faster.load(tmp_path / "hand-over")
    await history.make(range(4, 7), saved=(), learner=faster, settings=FASTER)
    assert_same(await history.resume(FASTER), faster)
    assert [learner.is_closed for learner in history.opened] == [True, False]


async def test_steps_are_made_again_with_what_the_machine_has_now(tmp_path: Path, model: Path) -> None:
    history, unbroken = History(tmp_path, model), NearLearner(model)
    elsewhere = LEARNER.model_copy(update={"device": "gpu", "call_timeout_s": 5.0})
    await history.make(range(1, 4), saved=(1,), learner=unbroken, settings=elsewhere)
    assert_same(await history.resume(), unbroken)
    assert len(history.opened) == 1, "no second learner, and none that asks for a GPU"


async def test_a_step_that_comes_out_otherwise_is_told(tmp_path: Path, model: Path) -> None:
    history, _ = await make_history(tmp_path, model)

    async def open_other(settings: LearnerConfig) -> NearLearner:
        other = NearLearner(model, settings)
        other.service._parameters["model.embed_tokens.weight"].data[0, 0] += 1.0
        return other

    ledger, _ = await history.open()
    none = Checkpoints(tmp_path / "none" / "checkpoints")
    await resume(ledger, none, LEARNER, save_every=100, open_learner=open_other, say=history.say)
    await ledger.aclose()
    assert any(line.startswith("step 1 came out otherwise (the loss of update 1 of 2") for line in history.lines)
    assert sum("came out otherwise" in line for line in history.lines) == 6


class Killed(Exception):
    """Stands for a kill: nothing is said or saved after it."""


class MortalLearner(NearLearner):
    """Fails before it makes a step a second time."""

    fails_at = 0
    failure: Exception = Killed()

    async def step(self, rows: Sequence[TrainRow]) -> StepReport:
        if self.version + 1 == self.fails_at:
            raise self.failure
        return await super().step(rows)


async def test_a_second_kill_while_steps_are_made_again_costs_no_more_than_the_first(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, unbroken = await make_history(tmp_path, model, saved=())
    mortal = MortalLearner(model)
    mortal.fails_at = 6

    async def open_mortal(settings: LearnerConfig) -> NearLearner:
        return mortal

    with monkeypatch.context() as patch:
        patch.setattr(history, "open_learner", open_mortal)
        with pytest.raises(Killed):
            await history.resume(save_every=2)
        assert mortal.is_closed
        mortal.failure = StepRefusedError("step refused at version 5, weights unchanged: the loss is nan")
        with pytest.raises(WorkerError, match=r"step 6 is on record, and now the learner refuses it \(step .* nan\)"):
            await history.resume(save_every=2)
    history.lines.clear()
    assert_same(await history.resume(save_every=2), unbroken)
    assert history.lines == ["making steps 5 to 6 again from the ledger, on checkpoint version-00000004"]


@pytest.mark.parametrize("content", ["not a checkpoint", "something else"])
async def test_a_checkpoint_that_is_whole_and_does_not_load_falls_back_too(
    tmp_path: Path, model: Path, content: str
) -> None:
    history, unbroken = await make_history(tmp_path, model)
    ledger, checkpoints = await history.open()
    await ledger.aclose()
    state, named = tmp_path / "checkpoints" / "version-00000004" / "learner.pt", tmp_path / "state"
    named.mkdir()
    (named / "learner.pt").write_bytes(content.encode())
    if content == "something else":
        torch.save({"version": 4}, named / "learner.pt")
    shutil.rmtree(state.parent)
    checkpoints._seal(named, state.parent, 4)
    assert_same(await history.resume(), unbroken)
    assert history.lines[0].startswith("checkpoint version-00000004 cannot be used (learner checkpoint ")
    assert "learner.pt is damaged: " in history.lines[0]
    assert "making steps 3 to 6 again from the ledger, on checkpoint version-00000002" in history.lines[1]


async def test_a_damaged_trace_is_told_and_its_step_is_made_again(tmp_path: Path, model: Path) -> None:
    history, unbroken = await make_history(tmp_path, model)
    change_ledger(tmp_path, "UPDATE steps SET trace = substr(trace, 1, 500) WHERE step = 5")
    assert_same(await history.resume(), unbroken)
    assert history.lines[1:] == [
        "step 5 was made again, and cannot be compared: its trace is damaged (BadZipFile: File is not a zip file)"
    ]


async def test_a_configuration_of_old_that_no_longer_parses_is_named_with_its_step(tmp_path: Path, model: Path) -> None:
    history, _ = await make_history(tmp_path, model)
    change_ledger(tmp_path, "UPDATE configs SET value = json_insert(value, '$.learner.gone', 1)")
    with pytest.raises(ConfigError, match=r"configuration on record of step 5: unknown key 'gone'"):
        await history.resume()
    change_ledger(tmp_path, "UPDATE configs SET value = json_remove(value, '$.learner.gone')")
    change_ledger(tmp_path, "UPDATE configs SET value = json_insert(value, '$.gone', 1)")
    with pytest.raises(ConfigError, match=r"configuration on record of step 5: unknown key 'gone'"):
        await history.resume()
    assert all(learner.is_closed for learner in history.opened)


def change_ledger(run: Path, statement: str) -> None:
    with closing(sqlite3.connect(run / "ledger.sqlite")) as connection, connection:
        connection.execute(statement)
