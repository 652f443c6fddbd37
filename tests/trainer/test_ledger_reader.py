"""A ledger is read wherever it lies and whatever became of its run, and leaves no trace of that."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from palaestra.errors import LedgerError
from palaestra.trainer.ledger import Ledger, read_meta, read_records
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
