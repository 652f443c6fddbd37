"""One step again: equal, or what differs is named; what could not be compared is told apart; the run is only read."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from palaestra.cli._main import app
from palaestra.errors import ConfigError, LedgerError
from palaestra.trainer.learner import LearnerConfig
from palaestra.trainer.replay import Replay, replay
from palaestra.trainer.resume import Again
from palaestra.trainer.trace import StepTrace
from tests.trainer.test_ledger_reader import read_only
from tests.trainer.test_resume import NearLearner, change_ledger, make_history
from tests.trainer.test_resume import model as model  # the fixture
from tests.trainer.test_trace import make_trace


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.slow
async def test_a_replay_is_equal_or_names_what_differs(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    history, _ = await make_history(run, model)
    lines = history.lines
    before = files_of(run)
    with read_only(run):
        found = await replay(run, 6, model=str(model), say=lines.append)
    assert found.is_equal
    assert (found.step, found.start) == (6, 4)
    assert "bit for bit" in found.describe()
    assert files_of(run) == before, "no file is made or changed"
    await replay(run, 5, model=str(model), say=lines.append)
    assert files_of(run) == before, "nor where it could be"
    _spoil_trace(run)
    found = await replay(run, 6, model=str(model), say=lines.append)
    assert not found.is_equal
    assert "step 6 DIFFERS: the gradient of model.embed_tokens.weight in update 1 of 2 differs" in found.describe()
    change_ledger(run, "UPDATE steps SET trace = substr(trace, 1, 500) WHERE step >= 5")
    lines.clear()
    found = await replay(run, 6, model=str(model), say=lines.append)
    assert not found.is_compared
    assert found.describe().startswith("step 6 cannot be compared: its trace on record is damaged (BadZipFile")
    assert lines[0].startswith("on the way, step 5 cannot be compared: its trace on record is damaged")
    with pytest.raises(LedgerError, match="no step 7"):
        await replay(run, 7, model=str(model), say=lines.append)
    with pytest.raises(ConfigError, match="say where that is with --model"):
        await replay(run, 6, model="other/model", say=lines.append)


def _spoil_trace(run: Path) -> None:
    with closing(sqlite3.connect(run / "ledger.sqlite")) as connection, connection:
        (blob,) = connection.execute("SELECT trace FROM steps WHERE step = 6").fetchone()
        trace = StepTrace.from_bytes(blob)
        prints = trace.fingerprints.copy()
        prints[0, 0, 0] ^= 1
        spoiled = replace(trace, fingerprints=prints).to_bytes()
        connection.execute("UPDATE steps SET trace = ? WHERE step = 6", (spoiled,))


class NearbyLearner(NearLearner):
    """The learner's own code in this process, as a context."""

    async def __aenter__(self) -> NearbyLearner:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def thin_out(monkeypatch: pytest.MonkeyPatch, model: Path, checkpoints: list[Path]) -> list[NearbyLearner]:
    """Let the run remove one more of these checkpoints each time a learner's process starts."""
    opened: list[NearbyLearner] = []

    async def open_slowly(source: str, config: LearnerConfig, log_path: Path) -> NearbyLearner:
        if checkpoints:
            shutil.rmtree(checkpoints.pop())
        opened.append(NearbyLearner(model, config))
        return opened[-1]

    monkeypatch.setattr("palaestra.trainer.replay._open", open_slowly)
    return opened


async def test_a_checkpoint_that_is_thinned_out_before_it_is_loaded_is_looked_for_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    await make_history(run, model, saved=(2, 4))
    opened = thin_out(monkeypatch, model, [run / "checkpoints" / "version-00000004"])
    found = await replay(run, 6, model=str(model), say=pytest.fail)
    assert (found.start, found.is_equal, len(opened)) == (2, True, 2)
    assert all(learner.is_closed for learner in opened)
    thin_out(monkeypatch, model, [run / "checkpoints" / "version-00000002"])
    assert (await replay(run, 6, model=str(model), say=pytest.fail)).start == 0


async def test_the_search_for_a_checkpoint_ends(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    await make_history(run, model, saved=(1, 2, 3, 4))
    opened = thin_out(monkeypatch, model, sorted((run / "checkpoints").iterdir()))
    with pytest.raises(ConfigError, match=r"no learner checkpoint in .*version-00000002"):
        await replay(run, 6, model=str(model), say=pytest.fail)
    assert len(opened) == 3


async def test_a_whole_checkpoint_that_does_not_load_is_not_looked_for_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: NearbyLearner, folder: Path) -> None:
        raise ConfigError("of another model")

    await make_history(tmp_path, model, saved=(4,))
    opened = thin_out(monkeypatch, model, [])
    monkeypatch.setattr(NearbyLearner, "load", refuse)
    with pytest.raises(ConfigError, match="of another model"):
        await replay(tmp_path, 6, model=str(model), say=pytest.fail)
    assert len(opened) == 1


TRACE = make_trace()
ZERO = replace(TRACE, fingerprints=np.zeros_like(TRACE.fingerprints))
OTHER = replace(TRACE, losses=TRACE.losses + 1)


@pytest.mark.parametrize(
    ("again", "code", "words"),
    [
        (Again(before=TRACE, now=TRACE), 0, "came out as recorded, bit for bit: loss 0.25, 0.125, 4 gradients, made"),
        (Again(before=ZERO, now=ZERO), 0, "all 4 gradients are zero, so that their agreement proves little"),
        (Again(before=TRACE, now=OTHER), 3, "DIFFERS: the loss of update 1 of 2"),
        (Again(before=None, now=TRACE), 1, "has no trace on record: there is nothing to compare with"),
        (Again(before=None, now=TRACE, damage="BadZipFile: x"), 1, "its trace on record is damaged (BadZipFile: x)"),
    ],
)
def test_the_exit_code_tells_what_differs_from_what_could_not_be_compared(
    again: Again, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def found(run: Path, step: int, **_: object) -> Replay:
        return Replay(step=step, start=0, again=again)

    monkeypatch.setattr("palaestra.trainer.replay.replay", found)
    done = CliRunner().invoke(app, ["replay", "run", "--step", "3"])
    assert (done.exit_code, words in done.stdout) == (code, True), done.stdout
    value = json.loads(CliRunner().invoke(app, ["replay", "run", "--step", "3", "--json"]).stdout)
    assert (value["equal"], value["compared"], value["zero"]) == (code == 0, code != 1, "zero" in words)
