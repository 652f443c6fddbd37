"""A batch that the learner refuses: dropped by name, so that it does not come again at each start."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from palaestra.errors import StepRefusedError, leaves
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.learner import StepReport
from tests.toys import ToyLearner
from tests.trainer.test_fit import Run, config
from tests.trainer.test_fit import tokenizer as tokenizer  # the fixture


class ChoosyLearner(ToyLearner):
    """Refuses its first batches."""

    def __init__(self, num_refused: int) -> None:
        super().__init__()
        self.num_refused = num_refused

    async def step(self, rows: Sequence[TrainRow]) -> StepReport:
        if self.num_refused:
            self.num_refused -= 1
            raise StepRefusedError(f"step refused at version {self.version}, weights unchanged: the loss is nan")
        return await super().step(rows)


async def test_a_batch_that_the_learner_refuses_is_dropped_with_its_line(tmp_path: Path, tokenizer: Path) -> None:
    run = Run(tmp_path, tokenizer, config(steps=2))
    run.learner = ChoosyLearner(1)
    await run.train()
    async with run.open():
        balance, (event, *_) = await run.ledger.balance(), await run.ledger.events()
    assert (run.learner.version, balance.dropped["refused"]) == (2, 2)
    assert run.records[0].dropped["refused"] == 2
    assert "are dropped (refused): step refused at version 0, weights unchanged: the loss is nan" in event[1]
    assert event[1] in run.notes


async def test_a_batch_is_dropped_before_its_line_which_nobody_need_read(tmp_path: Path, tokenizer: Path) -> None:
    seen: list[tuple[int, int]] = []

    def say(line: str) -> None:
        with closing(sqlite3.connect(f"file:{tmp_path / 'ledger.sqlite'}?mode=ro", uri=True)) as connection:
            (dropped,) = connection.execute("SELECT COUNT(*) FROM groups WHERE reason = 'refused'").fetchone()
            (noted,) = connection.execute("SELECT COUNT(*) FROM events WHERE line = ?", (line,)).fetchone()
        seen.append((dropped, noted))
        raise BrokenPipeError("nobody reads this")

    run = Run(tmp_path, tokenizer, config(steps=2))
    run.learner, run.say = ChoosyLearner(1), say
    await run.train()
    assert (run.learner.version, seen) == (2, [(2, 1)])


async def test_a_learner_that_refuses_twice_in_a_row_stops_the_run_and_the_next_start_has_other_groups(
    tmp_path: Path, tokenizer: Path
) -> None:
    run = Run(tmp_path, tokenizer, config(steps=2))
    run.learner = ChoosyLearner(2)
    with pytest.raises(ExceptionGroup) as caught:
        await run.train()
    assert any(isinstance(leaf, StepRefusedError) for leaf in leaves(caught.value))
    async with run.open():
        assert (await run.ledger.balance()).dropped["refused"] == 4
    again = Run(tmp_path, tokenizer, config(steps=2))
    await again.train()
    assert again.learner.version == 2
    async with again.open():
        assert (await again.ledger.balance()).dropped["refused"] == 4
