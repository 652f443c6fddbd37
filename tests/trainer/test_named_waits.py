"""No wait of the loop is silent: not on its way, not at its end, and not when an error or a signal ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from palaestra.errors import StepRefusedError, WorkerError, leaves
from palaestra.trainer import stalls
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.learner import StepReport
from tests.toys import Echo, ToyLearner
from tests.trainer.test_fit import Holding, Run, config
from tests.trainer.test_fit import tokenizer as tokenizer  # the fixture

CLOSED = "the loop waits for the episodes under way to be closed"
START = {"stats", "score", "load_weights", "balance", "drops_told", "last_metrics", "step", "end"}
TRAINED = {"train", "publish", "amend", "save"}


class FaultyLearner(ToyLearner):
    """Has a fault in its first step, which it makes once `is_time`: `fails`, `is refused`, `hangs`, or none."""

    def __init__(self, fault: str, is_time: asyncio.Event) -> None:
        super().__init__()
        self.fault = fault
        self.is_time = is_time
        self.is_stepping = asyncio.Event()

    async def step(self, rows: Sequence[TrainRow]) -> StepReport:
        fault, self.fault = self.fault, ""
        if fault:
            await self.is_time.wait()
        self.is_stepping.set()
        if fault == "fails":
            raise WorkerError("the learner failed")
        if fault == "is refused":
            raise StepRefusedError("the loss is nan")
        if fault == "hangs":
            await asyncio.Event().wait()
        return await super().step(rows)


class Ending:
    """A process that ends when it is told to."""

    def __init__(self) -> None:
        self.is_over = asyncio.Event()

    async def watch(self) -> NoReturn:
        await self.is_over.wait()
        raise WorkerError("the learner was killed by SIGKILL")

    async def stacks(self) -> str:
        return "nowhere"


def make_run(folder: Path, tokenizer: Path, fault: str) -> Run:
    """Two groups are played, an episode of the third is held, and the learner has its fault."""
    run = Run(folder, tokenizer, config(steps=2, save_every=1, concurrency=1, stall_report_s=0.1))
    engine = Holding(run.choose)
    run.engine, run.learner = engine, FaultyLearner(fault, engine.is_held)
    if fault in ("fails", "hangs"):
        engine.num_answers = 2 * 4 * 2 + 1
    return run


async def live(run: Run) -> None:
    async with run.open() as fit:
        await fit.train()


@pytest.mark.parametrize("fault", ["", "is refused", "fails"])
async def test_no_wait_of_the_loop_is_without_a_name(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    run = make_run(tmp_path, tokenizer, fault)
    if fault == "is refused":
        run.engine.is_held.set()  # type: ignore[attr-defined]
    called: set[str] = set()
    unnamed: list[str] = []

    def watched(method: Callable[..., Awaitable[object]], name: str) -> Callable[..., Awaitable[object]]:
        async def call(*args: object) -> object:
            called.add(name)
            if not run.stalls._waits:
                unnamed.append(name)
            return await method(*args)

        return call

    def watch(owner: object, *names: str) -> None:
        for name in names:
            monkeypatch.setattr(owner, name, watched(getattr(owner, name), name))

    async with run.open() as fit:
        watch(run.engine, "stats", "score", "load_weights")
        watch(run.learner, "step", "publish", "save")
        watch(run.ledger, "train", "amend", "balance", "drops_told", "last_metrics", "drop", "note")
        watch(Echo, "end")
        if fault == "fails":
            with pytest.raises(ExceptionGroup):
                await fit.train()
        else:
            await fit.train()
    assert unnamed == []
    assert (
        called
        == {
            "": START | TRAINED,
            "is refused": START | TRAINED | {"drop", "note"},
            "fails": START - {"load_weights"},
        }[fault]
    )


@pytest.mark.parametrize("ending", ["the learner fails", "a process dies", "a second signal"])
async def test_an_environment_that_is_slow_to_end_is_told_of_whatever_ends_the_run(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(stalls, "_LOOK_S", 0.01)
    run = make_run(tmp_path, tokenizer, "fails" if ending == "the learner fails" else "hangs")
    process, may_end, end = Ending(), asyncio.Event(), Echo.end
    run.processes = [process]

    async def end_late(env: Echo) -> None:
        if run.learner.is_stepping.is_set():  # type: ignore[attr-defined]
            await may_end.wait()
        await end(env)

    monkeypatch.setattr(Echo, "end", end_late)
    num_open = Echo.num_open
    async with asyncio.timeout(60):
        living = asyncio.create_task(live(run))
        await run.learner.is_stepping.wait()  # type: ignore[attr-defined]
        if ending == "a process dies":
            process.is_over.set()
        elif ending == "a second signal":
            living.cancel()
        while not any(line.startswith(f"{CLOSED} for ") for line in run.notes):
            assert not living.done(), "it left without a line"
            await asyncio.sleep(0.01)
        assert CLOSED in Path(run.notes[-1].rpartition(" ")[2]).read_text()
        may_end.set()
        await asyncio.wait((living,))
    assert Echo.num_open == num_open
    if ending == "a second signal":
        assert living.cancelled()
    else:
        error = living.exception()
        assert error is not None
        messages = {"the learner fails": "the learner failed", "a process dies": "the learner was killed by SIGKILL"}
        assert [str(leaf) for leaf in leaves(error)] == [messages[ending]]
