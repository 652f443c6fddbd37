"""The auditor itself: each breach that is planted into a sound ledger is named, and nothing else."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from palaestra.trainer import _ledger_store as store
from tests.chaos.audit import check, check_kept, take
from tests.chaos.errand import errands
from tests.trainer.test_ledger import make_group


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Two steps of a group each, one group dropped, one being played."""
    path = tmp_path / "ledger.sqlite"
    with closing(store.connect(path)) as connection:
        store.check_meta(connection, {"run": "r"})
        store.use_config(connection, {"max_lag": 0})
        for number in range(4):
            issue(connection, number)
            end(connection, number, 0, version=min(number, 1))
        for number, step in ((0, 1), (1, 2)):
            end(connection, number, 1, version=number)
            store.finish(connection, number)
            store.train(connection, [number], step, {"step": step, "loss": 0.5}, b"trace")
        end(connection, 2, 1, version=1)
        store.finish(connection, 2)
        store.drop(connection, 2, "stale")
    return path


def issue(connection: sqlite3.Connection, number: int) -> None:
    store.issue(connection, number, errands().draw(number, seed=0), 2)


def end(connection: sqlite3.Connection, number: int, position: int, *, version: int) -> None:
    episode = make_group(number, version=version).episodes[0]
    store.end(connection, number, position, replace(episode, id=f"{number}.{position}"))


def plant(ledger: Path, *statements: str) -> None:
    with closing(sqlite3.connect(ledger)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_sound_ledger_has_no_complaint(ledger: Path) -> None:
    snapshot = take(ledger)
    assert check(snapshot, errands()) == []
    assert check_kept(snapshot, take(ledger)) == []
    assert (snapshot.last_step, snapshot.num_open) == (2, 1)


@pytest.mark.parametrize(
    ("statements", "complaint"),
    [
        (["UPDATE groups SET number = 9 WHERE number = 3", "UPDATE episodes SET number = 9 WHERE number = 3"], "gaps"),
        (["UPDATE groups SET task = (SELECT task FROM groups WHERE number = 1) WHERE number = 3"], "another task"),
        (["UPDATE groups SET reason = NULL WHERE number = 2"], "group 2 is dropped with the reason None"),
        (["DELETE FROM episodes WHERE number = 3 AND position = 1"], "are missing or belong to no group"),
        (["DELETE FROM plays WHERE number = 3"], "ended without a record"),
        (["UPDATE episodes SET outcome = 'timeout' WHERE number = 3 AND position = 0"], "the record of another one"),
        (["DELETE FROM steps WHERE step = 1"], "the steps [2] have gaps"),
        (["UPDATE steps SET metrics = '{}' WHERE step = 1"], "step 1 has no metrics"),
        (["UPDATE steps SET groups = '[0, 1]' WHERE step = 2"], "group 0 was trained twice, in steps 1 and 2"),
        (["UPDATE groups SET step = 2 WHERE number = 0"], "disagree on what was trained"),
        (["UPDATE plays SET record = record || ' ' WHERE number = 1 AND position = 0"], "its checksum differs"),
        (["DELETE FROM steps WHERE step = 2", "DELETE FROM steps WHERE step = 1"], "has a token of version 1"),
    ],
)
def test_breach_is_named(ledger: Path, statements: list[str], complaint: str) -> None:
    plant(ledger, *statements)
    assert any(complaint in line for line in check(take(ledger), errands())), check(take(ledger), errands())


def test_token_that_is_older_than_the_bound_is_named(ledger: Path) -> None:
    with closing(store.connect(ledger)) as connection:
        end(connection, 3, 1, version=0)
        store.finish(connection, 3)
        store.train(connection, [3], 3, {"step": 3}, b"trace")
    assert check(take(ledger), errands()) == ["step 3 trained group 3 with a token of version 0"]


@pytest.mark.parametrize(
    ("statements", "complaint"),
    [
        (["DELETE FROM plays WHERE number = 3"], "episode 3.0 is lost"),
        (["UPDATE plays SET rowid = 99 WHERE number = 3"], "episode 3.0 was played again, or its bytes changed"),
        (["UPDATE plays SET record = record || ' ' WHERE number = 3"], "was played again, or its bytes changed"),
        (["UPDATE plays SET trajectory = x'00' WHERE number = 3"], "was played again, or its bytes changed"),
        (["UPDATE groups SET size = 3 WHERE number = 3"], "group 3 is lost, or has another task or size"),
        (["DELETE FROM groups WHERE number = 3"], "group 3 is lost, or has another task or size"),
        (["UPDATE groups SET state = 'issued', step = NULL WHERE number = 0"], "group 0 went back"),
        (["UPDATE groups SET reason = 'late' WHERE number = 2"], "group 2 went back"),
        (["UPDATE configs SET value = '{}'"], "configurations or events were rewritten"),
        (["DELETE FROM steps WHERE step = 2"], "step 2 is lost or was rewritten"),
        (["UPDATE steps SET trace = x'00' WHERE step = 2"], "step 2 is lost or was rewritten"),
        (["UPDATE steps SET metrics = '{\"step\": 2}' WHERE step = 2"], "the metrics of step 2 were rewritten"),
    ],
)
def test_what_changed_between_two_lives_is_named(ledger: Path, statements: list[str], complaint: str) -> None:
    before = take(ledger)
    plant(ledger, *statements)
    assert any(complaint in line for line in check_kept(before, take(ledger)))


def test_ledger_that_was_not_begun_is_empty(tmp_path: Path) -> None:
    assert check(take(tmp_path / "ledger.sqlite"), errands()) == []
    (tmp_path / "ledger.sqlite").touch()
    assert check(take(tmp_path / "ledger.sqlite"), errands()) == []
