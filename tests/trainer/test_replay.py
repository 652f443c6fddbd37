"""One step again: equal, or what differs is named; what could not be compared is told apart; the run is only read."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from palaestra.cli._main import app
from palaestra.errors import ConfigError, LedgerError
from palaestra.trainer._model_identity import identity_of
from palaestra.trainer.replay import Replay, replay
from palaestra.trainer.resume import Again
from palaestra.trainer.trace import StepTrace
from tests.trainer.test_ledger_reader import read_only
from tests.trainer.test_resume import change_ledger, make_history
from tests.trainer.test_resume import model as model  # the fixture
from tests.trainer.test_trace import make_trace


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.slow
async def test_a_replay_is_equal_or_names_what_differs(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    history, _ = await make_history(run, model)
    ledger, _ = await history.open()
    await ledger.amend_meta("model", identity_of(str(model)))
    await ledger.aclose()
    before = files_of(run)
    with read_only(run):
        found = await replay(run, 6, model=str(model), say=history.lines.append)
    assert found.is_equal
    assert (found.step, found.start) == (6, 4)
    assert "bit for bit" in found.describe()
    assert files_of(run) == before, "no file is made or changed"
    await replay(run, 5, model=str(model), say=history.lines.append)
    assert files_of(run) == before, "nor where it could be"
    _spoil_trace(run)
    found = await replay(run, 6, model=str(model), say=history.lines.append)
    assert not found.is_equal
    assert "step 6 DIFFERS: the gradient of model.embed_tokens.weight in update 1 of 2 differs" in found.describe()
    change_ledger(run, "UPDATE steps SET trace = substr(trace, 1, 500) WHERE step >= 5")
    history.lines.clear()
    found = await replay(run, 6, model=str(model), say=history.lines.append)
    assert not found.is_compared
    assert found.describe().startswith("step 6 cannot be compared: its trace on record is damaged (BadZipFile")
    assert history.lines[0].startswith("on the way, step 5 cannot be compared: its trace on record is damaged")
    with pytest.raises(LedgerError, match="no step 7"):
        await replay(run, 7, model=str(model), say=history.lines.append)
    with pytest.raises(ConfigError, match="say where that is with --model"):
        await replay(run, 6, model="other/model", say=history.lines.append)


def _spoil_trace(run: Path) -> None:
    with closing(sqlite3.connect(run / "ledger.sqlite")) as connection, connection:
        (blob,) = connection.execute("SELECT trace FROM steps WHERE step = 6").fetchone()
        trace = StepTrace.from_bytes(blob)
        prints = trace.fingerprints.copy()
        prints[0, 0, 0] ^= 1
        spoiled = replace(trace, fingerprints=prints).to_bytes()
        connection.execute("UPDATE steps SET trace = ? WHERE step = 6", (spoiled,))


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
