"""A run folder that is not what it should be: a rule and one line for each, and never a wrong number."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from palaestra.errors import LedgerError
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.learner import Learner, LearnerConfig
from palaestra.trainer.ledger import FORMAT, Ledger
from palaestra.trainer.resume import resume
from tests.toys import ToyLearner
from tests.trainer.test_ledger import make_group

_PAGE = 4096
_NUM_GROUPS = 40


async def write_run(folder: Path, *, num_groups: int = _NUM_GROUPS) -> None:
    """A ledger with trained, dropped, finished and open groups, large enough for trees of several levels."""
    ledger = await Ledger.open(folder, meta={"seed": 0})
    await ledger.use_config(GRPOConfig().model_dump(mode="json"))
    for number in range(num_groups):
        group = make_group(number)
        await ledger.issue(number, group.task, len(group.episodes))
        for position, episode in enumerate(group.episodes):
            if number < num_groups - 1 or position == 0:
                await ledger.end(number, position, episode)
        if number < num_groups - 1:
            await ledger.finish(number)
    for step in range(1, 4):
        await ledger.train([4 * step, 4 * step + 1], step, {"padding": "y" * 2000}, None)
    await ledger.drop(1, "stale")
    await ledger.note("something happened")
    await ledger.aclose()


async def read_all(folder: Path) -> list[Any]:
    """All that a run reads when it is resumed or made again."""
    ledger = await Ledger.open(folder, meta={"seed": 0})
    try:
        steps = [await ledger.load_step(step) for step in range(1, await ledger.last_step() + 1)]
        return [
            await ledger.meta(),
            await ledger.last_config(),
            await ledger.steps(),
            [(step.groups, step.config, step.trace) for step in steps],
            await ledger.finished(),
            await ledger.open_groups(),
            await ledger.next_number(),
            await ledger.events(),
        ]
    finally:
        await ledger.aclose()


def text_of(values: list[Any]) -> str:
    return repr(values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    asyncio.run(write_run(folder))
    return folder


@pytest.mark.parametrize("filling", ["zeros", "noise"])
async def test_a_torn_page_is_named_or_changes_nothing(whole: Path, tmp_path: Path, filling: str) -> None:
    expected = text_of(await read_all(whole))
    data = (whole / "ledger.sqlite").read_bytes()
    assert len(data) > 30 * _PAGE
    noise = random.Random(0)
    num_named = 0
    for place in range(0, len(data), _PAGE):
        torn = bytes(_PAGE) if filling == "zeros" else noise.randbytes(_PAGE)
        (tmp_path / "ledger.sqlite").write_bytes(data[:place] + torn + data[place + _PAGE :])
        try:
            found = text_of(await read_all(tmp_path))
        except LedgerError as error:
            assert "\n" not in str(error)  # noqa: PT017  # most pages raise, and some need not
            assert "restore" in str(error)  # noqa: PT017
            num_named += 1
        else:
            assert found == expected, f"page {place // _PAGE} was lost without a word"
    assert num_named > 0.9 * len(data) / _PAGE


@pytest.mark.parametrize("number", [FORMAT - 1, FORMAT + 1])
async def test_a_ledger_of_another_format_is_refused_and_left_as_it_is(
    whole: Path, tmp_path: Path, number: int
) -> None:
    shutil.copy(whole / "ledger.sqlite", tmp_path)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as connection, connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'format'", (json.dumps(number),))
    before = (tmp_path / "ledger.sqlite").read_bytes()
    with pytest.raises(LedgerError, match=f"format {number}, this version of Palaestra reads format {FORMAT}: go on"):
        await read_all(tmp_path)
    assert (tmp_path / "ledger.sqlite").read_bytes() == before


async def go_on(folder: Path) -> tuple[Learner, list[str]]:
    told = list[str]()

    async def say(line: str) -> None:
        told.append(line)

    async def open_learner(config: LearnerConfig) -> ToyLearner:
        return ToyLearner()

    ledger = await Ledger.open(folder, meta={"seed": 0})
    try:
        checkpoints = Checkpoints(folder / "checkpoints", run=(await ledger.meta())["run"])
        learner = await resume(ledger, checkpoints, LearnerConfig(), save_every=10, open_learner=open_learner, say=say)
    finally:
        await ledger.aclose()
    return learner, told


async def save_checkpoint(folder: Path, version: int, *, run: str = "") -> Path:
    learner = ToyLearner()
    learner.version = version
    return await Checkpoints(folder / "checkpoints", run=run, kept=9).save(learner)


@pytest.mark.parametrize("is_empty_file", [True, False])
async def test_a_lost_ledger_is_no_new_run_where_there_are_checkpoints(tmp_path: Path, is_empty_file: bool) -> None:
    if is_empty_file:
        (tmp_path / "ledger.sqlite").touch()
    saved = await save_checkpoint(tmp_path, 7)
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"the ledger is empty, but there is a checkpoint of step 7: put .* back"):
            await go_on(tmp_path)
        assert saved.is_dir(), "nothing is set aside for it"


async def test_an_empty_ledger_of_a_run_that_had_just_begun_is_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").touch()
    learner, told = await go_on(tmp_path)
    assert (learner.version, told) == (0, [])


async def test_without_its_wal_a_ledger_is_what_it_was_at_its_last_checkpoint(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    await write_run(old)
    ledger = await Ledger.open(old, meta={})
    expected = await ledger.balance()
    await ledger.issue(_NUM_GROUPS, make_group(_NUM_GROUPS).task, 4)
    new.mkdir()
    shutil.copy(old / "ledger.sqlite", new)  # as after a kill, and without what is beside it
    await ledger.aclose()
    ledger = await Ledger.open(new, meta={})
    assert await ledger.balance() == expected
    await ledger.aclose()


async def test_checkpoints_of_another_run_or_beyond_the_ledger_or_newer_are_set_aside_by_name(tmp_path: Path) -> None:
    await write_run(tmp_path)
    ledger = await Ledger.open(tmp_path, meta={})
    run = (await ledger.meta())["run"]
    await ledger.aclose()
    await save_checkpoint(tmp_path, 1, run=run)
    await save_checkpoint(tmp_path, 3, run="of another")
    newer = await save_checkpoint(tmp_path, 2, run=run)
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    learner, told = await go_on(tmp_path)
    assert learner.version == 3
    assert told == [
        "checkpoint version-00000003 cannot be used (it belongs to another run or version); it is kept as "
        "version-00000003.damaged-1",
        "checkpoint version-00000002 cannot be used (it is of format 99, not 1); it is kept as "
        "version-00000002.damaged-1",
        "making steps 2 to 3 again from the ledger, on checkpoint version-00000001",
    ]
    await save_checkpoint(tmp_path, 9, run=run)
    _, told = await go_on(tmp_path)
    assert told == [
        "checkpoint version-00000009 cannot be used (it is of step 9, the ledger ends with 3); it is kept as "
        "version-00000009.damaged-1"
    ]
