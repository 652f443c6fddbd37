"""Reading a run's ledger without leaving a trace: of a run that goes on, that was killed, or on a read-only disk.

Invariant: no file of the run is made, changed or removed, but for the index that a run in use shares with its readers.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from palaestra.errors import FULL, LedgerError
from palaestra.trainer import _ledger_store as store

_BESIDE = ("-wal", "-shm")


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a ledger, through which nothing can be written; raises `LedgerError` where it cannot be read."""
    if not path.is_file():
        raise LedgerError(f"no ledger at {path}: give the folder of a run")
    with ExitStack() as stack:
        try:
            connection = stack.enter_context(closing(_connect(path, stack)))
            found = store.meta(connection).get("format")
            if found != store.FORMAT:
                raise LedgerError(
                    f"{path} was written in format {found}; this version of Palaestra reads format {store.FORMAT}"
                )
            yield connection
        except sqlite3.OperationalError as error:
            raise LedgerError(f"cannot read {path}: {error}") from error
        except (sqlite3.Error, json.JSONDecodeError) as error:
            raise LedgerError(f"cannot read {path}: {error}; the file is damaged: restore it from a copy") from error


def _connect(path: Path, stack: ExitStack) -> sqlite3.Connection:
    wal, index = (path.with_name(f"{path.name}{suffix}") for suffix in _BESIDE)
    if index.exists():  # in use, or left by a run that was killed
        return _open(path, "mode=ro")
    if not _size_of(wal):  # SQLite would make both files; without them nobody writes
        return _open(path, "mode=ro&immutable=1")
    # half a copy of a run: what is pending can be read only where an index can be made for it
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palaestra-ledger-")))
    try:
        for file in (path, wal):
            shutil.copyfile(file, place / file.name)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise LedgerError(f"cannot read {path}: {error}") from error
    return _open(place / path.name, "mode=ro")


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # perhaps at this moment: a run that ends removes it
        return 0


def _open(path: Path, how: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True, isolation_level=None)
