"""A ledger is read wherever it lies and whatever became of its run, and leaves no trace of that."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from palaestra.errors import LedgerError
from palaestra.trainer import _ledger_store as store
from palaestra.trainer.ledger import Ledger, read_meta, read_records, reading
from tests.conftest import require
from tests.trainer.test_ledger import make_task, open_ledger, play

KINDS = ("closed", "killed", "in half", "emptied")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder as on a disk that nobody can write; root writes what its mode forbids."""
    try:
        for command in (("mount", "--bind"), ("mount", "-o", "remount,ro,bind")):
            done = subprocess.run([*command, str(folder), str(folder)], capture_output=True, text=True, check=False)
            require("mount", done.stderr.strip() or None)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, stderr=subprocess.DEVNULL)


async def make_run(folder: Path, kind: str) -> Path:
    """A copy of a run with two episodes: closed, killed, killed without its index, or killed before it wrote."""
    live = folder / "live"
    ledger = await open_ledger(live)
    for number in range(2):
        await ledger.issue(number, make_task(number), 1)
        await play(ledger, number)
    run = folder / "run"
    if kind in ("closed", "emptied"):
        await ledger.aclose()
    if kind == "emptied":
        ledger = await Ledger.open(live, meta={})
        assert (live / "ledger.sqlite-wal").stat().st_size == 0
    shutil.copytree(live, run)
    await ledger.aclose()
    if kind == "in half":
        (run / "ledger.sqlite-shm").unlink()
    if kind == "emptied":
        (run / "ledger.sqlite-shm").unlink()
    return run


@pytest.mark.parametrize("kind", KINDS)
async def test_a_run_is_read_and_no_file_of_it_is_made_or_changed(tmp_path: Path, kind: str) -> None:
    run = await make_run(tmp_path, kind)
    before = files_of(run)
    assert len(before) == {"closed": 2, "killed": 4, "in half": 3, "emptied": 3}[kind]
    assert read_meta(run)["seed"] == 1
    assert sum(1 for _ in read_records(run)) == 2
    after = files_of(run)
    if kind == "killed":  # readers and writers share the index
        before["ledger.sqlite-shm"] = after["ledger.sqlite-shm"]
    assert after == before


@pytest.mark.parametrize("kind", KINDS)
async def test_a_run_on_a_read_only_disk_is_read(tmp_path: Path, kind: str) -> None:
    run = await make_run(tmp_path, kind)
    before = files_of(run)
    with read_only(run):
        with pytest.raises(OSError, match="Read-only"):
            (run / "anything").touch()
        assert read_meta(run)["seed"] == 1
        assert sum(1 for _ in read_records(run)) == 2
    assert files_of(run) == before


async def test_a_run_that_goes_on_is_read_up_to_its_last_word(tmp_path: Path) -> None:
    ledger = await open_ledger(tmp_path)
    await ledger.issue(0, make_task(0), 1)
    await play(ledger, 0)
    assert sum(1 for _ in read_records(tmp_path)) == 1
    await ledger.issue(1, make_task(1), 1)
    await play(ledger, 1)
    assert sum(1 for _ in read_records(tmp_path)) == 2
    await ledger.aclose()


async def test_a_run_that_is_taken_up_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    run = await make_long_run(tmp_path)
    records = read_records(run)
    found = [next(records)]
    ledger = await Ledger.open(run, meta={})
    for number in range(200, 400):
        await ledger.issue(number, make_task(number), 1)
        await play(ledger, number)
    await ledger._do(lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
    found.extend(records)
    assert [record["id"] for record in found] == [f"{number}.0" for number in range(400)]
    await ledger.aclose()


@pytest.mark.parametrize("is_left_again", [True, False])
async def test_what_was_read_while_the_file_changed_is_read_again(tmp_path: Path, is_left_again: bool) -> None:
    run = await make_long_run(tmp_path)
    before = files_of(run)
    changes = [lambda: rewrite(run, is_left_again=is_left_again)]
    left: list[sqlite3.Connection | None] = []

    def count(connection: sqlite3.Connection) -> int:
        cursor = connection.execute("SELECT record, trajectory FROM plays ORDER BY number")
        num_read = len(cursor.fetchmany(2))
        if changes:
            left.append(changes.pop()())
        return num_read + len(cursor.fetchall())

    with reading(run) as reader:
        assert reader.ask(count) == 1, "all but one were deleted meanwhile, and their pages given back"
    for each in filter(None, left):
        each.close()
    assert files_of(run).keys() == before.keys()


async def make_long_run(folder: Path) -> Path:
    """A run that ended, with 200 episodes."""
    ledger = await open_ledger(folder)
    for number in range(200):
        await ledger.issue(number, make_task(number), 1)
        await play(ledger, number)
    await ledger.aclose()
    return folder


def rewrite(run: Path, *, is_left_again: bool) -> sqlite3.Connection | None:
    connection = sqlite3.connect(run / "ledger.sqlite", isolation_level=None)
    connection.execute("DELETE FROM plays WHERE number > 0")
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    if not is_left_again:
        return connection
    connection.close()
    return None


async def test_half_a_copy_is_copied_once_for_all_questions_and_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await make_run(tmp_path, "in half")
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with reading(run) as reader:
        assert reader.ask(store.meta)["seed"] == 1
        (copy,) = place.iterdir()
        assert len(reader.ask(store.records, (-1, -1), 9)) == 2
        assert list(place.iterdir()) == [copy]
    assert list(place.iterdir()) == []


async def test_damage_is_told_at_once_also_of_a_run_that_goes_on(tmp_path: Path) -> None:
    ledger = await open_ledger(tmp_path)
    asked: list[None] = []

    def find_damage(connection: sqlite3.Connection) -> None:
        asked.append(None)
        raise sqlite3.DatabaseError("malformed")

    for _ in range(2):
        with reading(tmp_path) as reader, pytest.raises(LedgerError, match="malformed; the file is damaged"):
            reader.ask(find_damage)
        await ledger.aclose()
    assert len(asked) == 2


@pytest.mark.parametrize("text", [b"not a database, and long enough to be looked at" * 100, None])
def test_what_cannot_be_read_is_one_line(tmp_path: Path, text: bytes | None) -> None:
    if text is not None:
        (tmp_path / "ledger.sqlite").write_bytes(text)
    with pytest.raises(LedgerError, match="no ledger at" if text is None else "the file is damaged: restore it"):
        read_meta(tmp_path)


async def test_a_record_that_is_torn_is_one_line(tmp_path: Path) -> None:
    run = await make_run(tmp_path, "closed")
    with sqlite3.connect(run / "ledger.sqlite") as connection:
        connection.execute("UPDATE plays SET record = substr(record, 1, 20)")
    connection.close()
    with pytest.raises(LedgerError, match="the file is damaged: restore it"):
        list(read_records(run))
