"""How a run starts: in which order its parts, under which names their waits, and what is said."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

import pytest

from palaestra.resources import Resources
from palaestra.trainer import Trainer
from palaestra.trainer._model_identity import identity_of
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.learner import LearnerConfig
from palaestra.trainer.ledger import Ledger
from tests.toys import ToyEngine, ToyLearner
from tests.trainer.test_resume import config, make_history
from tests.trainer.test_resume import model as model  # the fixture


async def test_a_line_of_the_trainer_is_noted_though_nobody_reads_it(tmp_path: Path, model: Path) -> None:
    def say(line: str) -> NoReturn:
        raise BrokenPipeError("nobody reads this")

    trainer = Trainer(model, config(), run=tmp_path, on_note=say)
    ledger = await Ledger.open(tmp_path, meta={})
    await trainer._tell(ledger, trainer._stalls(), "a line")
    assert await ledger.events() == [(0, "a line")]
    await ledger.aclose()


class Process:
    """What a report asks of a part in a process of its own."""

    async def watch(self) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError

    async def stacks(self) -> str:
        return "somewhere"


class EngineProcess(Process, ToyEngine):
    """An engine whose stacks a report has."""


class LearnerProcess(Process, ToyLearner):
    """A learner whose stacks a report has."""


async def test_a_start_is_named_by_what_starts_and_shows_whatever_is_there(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(model, config(), run=tmp_path)
    engine, learner = EngineProcess(lambda prompt, seed: [0]), LearnerProcess()
    may_start = {each: asyncio.Event() for each in ("learner", "engine")}

    async def open_engine(*args: object, **kwargs: object) -> ToyEngine:
        await may_start["engine"].wait()
        return engine

    async def open_learner(settings: LearnerConfig) -> ToyLearner:
        await may_start["learner"].wait()
        return learner

    monkeypatch.setattr("palaestra.trainer.trainer.open_engine", open_engine)
    monkeypatch.setattr(trainer, "_open_learner", open_learner)
    ledger = await Ledger.open(tmp_path, meta={"model": identity_of(str(model))})
    stalls = trainer._stalls()
    waits = ["the run waits for the engine to start", "the run waits for the learner to start"]

    async def until(*texts: str) -> None:
        while sorted(wait.text for wait in stalls._waits) != list(texts):
            await asyncio.sleep(0)

    async with asyncio.timeout(60), Resources() as own, asyncio.TaskGroup() as tasks:
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        opening = tasks.create_task(trainer._open_models(own, ledger, checkpoints, None, stalls))
        await until(*waits)
        assert "engine.log" in Path(await stalls.report()).read_text(), "which says how far it is"
        may_start["engine"].set()
        await until(waits[1])
        assert stalls.processes == [engine]
        may_start["learner"].set()
        await opening
        assert stalls.processes == [engine, learner]
    await ledger.aclose()


async def test_an_engine_starts_once_the_steps_were_made_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, _ = await make_history(tmp_path, model)
    trainer = Trainer(model, config(), run=tmp_path)
    seen: list[int] = []

    async def open_engine(*args: object, **kwargs: object) -> ToyEngine:
        seen.append(history.opened[-1].version)
        return ToyEngine(lambda prompt, seed: [0])

    monkeypatch.setattr("palaestra.trainer.trainer.open_engine", open_engine)
    monkeypatch.setattr(trainer, "_open_learner", history.open_learner)
    ledger, checkpoints = await history.open()
    async with Resources() as own:
        stalls = trainer._stalls()
        learner, _ = await trainer._open_models(own, ledger, checkpoints, None, stalls)
        assert (learner.version, seen) == (6, [6])
        assert list(map(id, stalls.processes)) == [id(learner)], "a report has its stacks; the toy engine has none"
        assert history.opened == [learner]
    assert history.opened[0].is_closed
    await ledger.aclose()
