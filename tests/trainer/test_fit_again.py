"""A run that was stopped or killed is fitted again: groups, curves and counts go on where they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from palaestra.types import Outcome
from tests.toys import Echo
from tests.trainer.test_fit import Run, config, read_plays
from tests.trainer.test_fit import tokenizer as tokenizer  # the fixture
from tests.trainer.test_ledger import make_group


async def test_stopped_run_goes_on_and_trains_every_group_once(tmp_path: Path, tokenizer: Path) -> None:
    first = Run(tmp_path, tokenizer, config())
    first.stop_after = 2
    num_open = Echo.num_open
    await first.train()
    assert Echo.num_open == num_open, "episodes under way are ended"
    assert [record.step for record in first.records] == [1, 2]
    before = read_plays(tmp_path)
    second = Run(tmp_path, tokenizer, config())
    await second.train()
    assert second.notes == [], "the checkpoint is of the last step: none is made again"
    assert [record.step for record in second.records] == [3, 4, 5, 6]

    async with second.open():
        balance = await second.ledger.balance()
        steps = [await second.ledger.load_step(step) for step in range(1, 7)]
        waiting = [number for number, _ in await second.ledger.finished()]
        waiting += [group.number for group in await second.ledger.open_groups()]
    trained = [number for step in steps for number, _ in step.groups]
    assert [len(step.groups) for step in steps] == [2] * 6
    assert len(set(trained)) == 12
    assert balance.dropped == {}
    assert sorted(trained + waiting) == list(range(balance.issued)), "each group is in one place"
    for step, batch in zip(steps, first.learner.batches + second.learner.batches, strict=True):
        played = [episode.trajectory for _, group in step.groups for episode in group.episodes]
        assert [row.trajectory for row in batch] == played, "what was learned is what is on record"
    after = read_plays(tmp_path)
    assert {key: after[key] for key in before} == before, "what was played in the first life stands"
    assert set(after) >= {(number, position) for number in trained for position in range(4)}


async def test_the_engines_seconds_are_those_of_all_lives(tmp_path: Path, tokenizer: Path) -> None:
    first, second = (Run(tmp_path, tokenizer, config(steps=steps)) for steps in (2, 6))
    first.engine._requests = 5000  # of an owner who used it before
    await first.train()
    await second.train()
    totals = [record.engine_busy_s for record in first.records + second.records]
    assert totals == sorted(totals)
    assert 0 < totals[0] <= totals[1] < totals[-1]
    assert totals[1] <= (await first.engine.stats()).busy_s - 5.0
    assert totals[-1] - totals[1] <= (await second.engine.stats()).busy_s
    assert all(record.use_engine >= 0 for record in first.records + second.records)


async def test_a_start_reads_no_step_but_the_last(tmp_path: Path, tokenizer: Path) -> None:
    await Run(tmp_path, tokenizer, config(steps=2)).train()
    run = Run(tmp_path, tokenizer, config(steps=3))

    async def read_all() -> NoReturn:
        raise AssertionError("a long run has many")

    async with run.open() as fit:
        run.ledger.steps = read_all  # type: ignore[method-assign]
        await fit.train()
    assert [record.step for record in run.records] == [3]


async def test_curves_go_on_where_a_killed_run_left_them(tmp_path: Path, tokenizer: Path) -> None:
    """Totals count all lives of a run, and what was dropped after the last recorded step is told by the next one."""
    first = Run(tmp_path, tokenizer, config())
    async with first.open():
        await first.ledger.issue(0, make_group(0).task, 1)
        await first.ledger.end(0, 0, make_group(0).episodes[0])
        await first.ledger.finish(0)
        await first.ledger.drop(0, "zero_variance")
    second = Run(tmp_path, tokenizer, config(steps=2))
    await second.train()
    assert [record.dropped for record in second.records] == [{"zero_variance": 1}, {}]
    third = Run(tmp_path, tokenizer, config(steps=3))
    await third.train()
    assert [record.dropped for record in third.records] == [{}]
    async with third.open():
        balance = await third.ledger.balance()
    assert third.records[0].generated > second.records[-1].generated
    assert third.records[0].generated <= balance.episodes_ended
    assert third.records[0].verified == third.records[0].generated


async def test_spares_that_a_killed_run_left_are_not_played(tmp_path: Path, tokenizer: Path) -> None:
    first = Run(tmp_path, tokenizer, config())
    async with first.open():
        await first.ledger.issue(0, first.suite.draw(0, seed=0), 5)
        for position in range(4):
            await first.ledger.end(0, position, replace(make_group(0).episodes[0], id=f"0.{position}"))
    second = Run(tmp_path, tokenizer, config(steps=1, num_spare=1))
    await second.train()
    async with second.open():
        groups = dict((await second.ledger.load_step(1)).groups) | dict(await second.ledger.finished())
    assert [episode.outcome for episode in groups[0].episodes] == [Outcome.SCORED] * 4 + [Outcome.CANCELLED]
